#include "workspace.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <tuple>
#include <utility>
#include <vector>

namespace etap {
namespace {

using StreamKey = std::tuple<int, cudaStream_t, int, int>;  // device, stream, num_ctas, row_tile
using CaptureKey = std::pair<StreamKey, unsigned long long>;  // and the capture

struct Buffer {
  int device = -1, num_ctas = 0, row_tile = 0;
  void* data = nullptr;

  bool serves(StreamKey const& key) const {
    return device == std::get<0>(key) && num_ctas == std::get<2>(key) && row_tile == std::get<3>(key);
  }
};

struct Pool {
  std::mutex mutex;
  std::map<StreamKey, Buffer> of_stream;  // never freed: launches in flight may use them
  std::map<CaptureKey, Buffer> of_capture;
  std::vector<Buffer> idle;  // from graphs that are gone

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

cudaError_t allocate(StreamKey const& key, cudaStream_t stream, Buffer* buffer) {
  auto const [device, unused, num_ctas, row_tile] = key;
  size_t const bytes = workspace_bytes(num_ctas, row_tile);
  Buffer made{device, num_ctas, row_tile, nullptr};
  cudaError_t status = cudaMalloc(&made.data, bytes);
  if (status != cudaSuccess) return status;
  status = cudaMemsetAsync(made.data, 0, kWorkspaceHeaderBytes, stream);
  if (status == cudaSuccess) {
    char* const words = static_cast<char*>(made.data) + kWorkspaceHeaderBytes;
    status = cudaMemsetAsync(words, 0xff, bytes - kWorkspaceHeaderBytes, stream);
  }
  if (status == cudaSuccess) *buffer = made;
  return status;
}

// Lets this thread allocate and synchronise while a capture is under way.
struct RelaxedCapture {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
};

cudaError_t take_for_graph(Pool& pool, CaptureKey const& key, cudaGraph_t graph, Buffer* held) {
  auto const found =
      std::find_if(pool.idle.begin(), pool.idle.end(), [&](Buffer const& b) { return b.serves(key.first); });
  cudaError_t status = cudaSuccess;
  Buffer buffer;
  if (found != pool.idle.end()) {
    buffer = *found;
    pool.idle.erase(found);
  } else {
    RelaxedCapture const relaxed;
    cudaStream_t side = nullptr;  // initialises now, not in each replay
    status = cudaStreamCreateWithFlags(&side, cudaStreamNonBlocking);
    if (status == cudaSuccess) status = allocate(key.first, side, &buffer);
    if (status == cudaSuccess) status = cudaStreamSynchronize(side);
    if (side) cudaStreamDestroy(side);
    if (status != cudaSuccess) return status;
  }
  cudaUserObject_t object = nullptr;
  status = cudaUserObjectCreate(&object, new GraphHold{key, buffer}, GraphHold::release, 1,
                                cudaUserObjectNoDestructorSync);
  if (status == cudaSuccess) status = cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove);
  if (status == cudaSuccess) *held = buffer;
  return status;
}

}  // namespace

cudaError_t acquire_workspace(int device, cudaStream_t stream, LaunchConfig const& config, void** workspace) {
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
  StreamKey const stream_key(device, stream, config.num_ctas, config.row_tile);
  if (capturing == cudaStreamCaptureStatusActive) {
    CaptureKey const key(stream_key, id);  // branches of one graph may overlap: a workspace each
    Buffer& held = pool.of_capture[key];
    if (!held.data) status = take_for_graph(pool, key, graph, &held);
    *workspace = held.data;
    return status;
  }
  Buffer& own = pool.of_stream[stream_key];
  if (!own.data) status = allocate(stream_key, stream, &own);
  *workspace = own.data;
  return status;
}

}  // namespace etap
