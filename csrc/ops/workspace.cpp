#include "workspace.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "etap/launch.h"

namespace etap {
namespace {

struct Buffer {
  int device = -1;
  size_t bytes = 0;
  void* data = nullptr;
};

struct Pool {
  std::mutex mutex;
  std::map<std::pair<int, cudaStream_t>, Buffer> of_stream;
  std::map<std::tuple<int, cudaStream_t, unsigned long long>, Buffer> of_capture;
  std::vector<Buffer> idle;  // initialised; from graphs that are gone

  static Pool& instance() {
    static Pool* const pool = new Pool;  // never destroyed: graphs may outlive static objects
    return *pool;
  }
};

// What a graph holds on to. CUDA runs the destructor where no CUDA call is allowed, so it only shelves the buffer.
struct GraphHold {
  std::tuple<int, cudaStream_t, unsigned long long> key;
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
    status = cudaMemsetAsync(static_cast<char*>(buffer->data) + kMergeCountBytes, 0xff, bytes - kMergeCountBytes, stream);
  }
  return status;
}

// Lets this thread allocate and synchronise while a capture is under way.
struct RelaxedCapture {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

cudaError_t take_for_graph(Pool& pool, int device, size_t bytes, cudaGraph_t graph, GraphHold* hold) {
  auto const fits = [&](Buffer const& b) { return b.device == device && b.bytes >= bytes; };
  auto const found = std::find_if(pool.idle.begin(), pool.idle.end(), fits);
  cudaError_t status = cudaSuccess;
  if (found != pool.idle.end()) {
    hold->buffer = *found;
    pool.idle.erase(found);
  } else {
    RelaxedCapture const relaxed;
    cudaStream_t side = nullptr;  // initialises now, not in each replay
    status = cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);
    if (status == cudaSuccess) status = allocate(device, bytes, side, &hold->buffer);
    if (status == cudaSuccess) status = cudaStreamSynchronize(side);
    if (side) cudaStreamDestroy(side);
  }
  if (status != cudaSuccess) return status;
  cudaUserObject_t object = nullptr;
  status = cudaUserObjectCreate(&object, hold, GraphHold::release, 1, cudaUserObjectNoDestructorSync);
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
    auto const key = std::make_tuple(device, stream, id);  // branches of one graph may overlap: one workspace each
    Buffer& held = pool.of_capture[key];
    if (held.bytes < bytes) {
      auto* const hold = new GraphHold{key, {}};
      status = take_for_graph(pool, device, bytes, graph, hold);
      if (status != cudaSuccess) {
        delete hold;
        return status;
      }
      held = hold->buffer;
    }
    *workspace = held.data;
    return cudaSuccess;
  }
  Buffer& own = pool.of_stream[{device, stream}];
  if (own.bytes < bytes) {
    Buffer larger;
    status = allocate(device, bytes, stream, &larger);
    if (status != cudaSuccess) return status;
    if (own.data) pool.idle.push_back(own);  // launches in flight may still use it; a graph may have it later
    own = larger;
  }
  *workspace = own.data;
  return cudaSuccess;
}

}  // namespace etap
