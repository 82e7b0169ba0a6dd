#include "workspace.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "etap/launch.h"

namespace etap {
namespace {

using CaptureKey = std::tuple<int, cudaStream_t, unsigned long long>;  // device, stream, capture

struct Buffer {
  int device = -1;
  size_t bytes = 0;
  void* data = nullptr;
};

struct Pool {
  std::mutex mutex;
  std::map<std::pair<int, cudaStream_t>, Buffer> of_stream;
  std::map<CaptureKey, Buffer> of_capture;
  std::vector<Buffer> idle;      // initialised, from graphs that are gone
  std::vector<Buffer> outgrown;  // launches in flight may still use them; never freed (at most one per row tile)

  static Pool& instance() {
    static Pool* const pool = new Pool;  // never destroyed: graphs may outlive static objects
    return *pool;
  }
};

// What a graph holds on to. CUDA runs the destructor where no CUDA call is allowed, so it only shelves the buffer.
struct GraphHold {
  CaptureKey key;
  Buffer buffer;

  static void release(void* hold) {
    auto* const self = static_cast<GraphHold*>(hold);
    Pool& pool = Pool::instance();
    std::lock_guard<std::mutex> const lock(pool.mutex);
    auto const found = pool.of_capture.find(self->key);
    if (found != pool.of_capture.end() && found->second.data == self->buffer.data) pool.of_capture.erase(found);
    pool.idle.push_back(self->buffer);
    delete self;
  }
};

cudaError_t allocate(int device, size_t bytes, cudaStream_t stream, Buffer* buffer) {
  *buffer = {device, bytes, nullptr};
  cudaError_t status = cudaMalloc(&buffer->data, bytes);
  if (status == cudaSuccess) status = cudaMemsetAsync(buffer->data, 0, kMergeCountBytes, stream);
  if (status == cudaSuccess) {
    char* const words = static_cast<char*>(buffer->data) + kMergeCountBytes;
    status = cudaMemsetAsync(words, 0xff, bytes - kMergeCountBytes, stream);
  }
  return status;
}

// Lets this thread allocate and synchronise while a capture is under way.
struct RelaxedCapture {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

cudaError_t take_for_graph(Pool& pool, CaptureKey const& key, size_t bytes, cudaGraph_t graph, Buffer* buffer) {
  int const device = std::get<0>(key);
  auto const found = std::find_if(pool.idle.begin(), pool.idle.end(),
                                  [&](Buffer const& b) { return b.device == device && b.bytes >= bytes; });
  cudaError_t status = cudaSuccess;
  if (found != pool.idle.end()) {
    *buffer = *found;
    pool.idle.erase(found);
  } else {
    RelaxedCapture const relaxed;
    cudaStream_t side = nullptr;  // initialises now, not in each replay
    status = cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);
    if (status == cudaSuccess) status = allocate(device, bytes, side, buffer);
    if (status == cudaSuccess) status = cudaStreamSynchronize(side);
    if (side) cudaStreamDestroy(side);
    if (status != cudaSuccess) return status;
  }
  cudaUserObject_t object = nullptr;
  status = cudaUserObjectCreate(&object, new GraphHold{key, *buffer}, GraphHold::release, 1,
                                cudaUserObjectNoDestructorSync);
  if (status == cudaSuccess) status = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  return status;
}

}  // namespace

cudaError_t acquire_workspace(int device, cudaStream_t stream, size_t bytes, void** workspace) {
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
#if CUDART_VERSION >= 13000
  cudaError_t status = cudaStreamGetCaptureInfo(stream, &capturing, &id, &graph, nullptr, nullptr, nullptr);
#else
  cudaError_t status = cudaStreamGetCaptureInfo_v2(stream, &capturing, &id, &graph, nullptr, nullptr);
#endif
  if (status != cudaSuccess) return status;
  Pool& pool = Pool::instance();
  std::lock_guard<std::mutex> const lock(pool.mutex);
  if (capturing == cudaStreamCaptureStatusActive) {
    CaptureKey const key(device, stream, id);  // branches of one graph may overlap: a workspace each
    Buffer& held = pool.of_capture[key];
    if (held.bytes < bytes) status = take_for_graph(pool, key, bytes, graph, &held);
    *workspace = held.data;
    return status;
  }
  Buffer& own = pool.of_stream[{device, stream}];
  if (own.bytes < bytes) {
    Buffer larger;
    status = allocate(device, bytes, stream, &larger);
    if (status != cudaSuccess) return status;
    if (own.data) pool.outgrown.push_back(own);
    own = larger;
  }
  *workspace = own.data;
  return status;
}

}  // namespace etap
