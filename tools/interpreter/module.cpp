// The kernels and their host code, on the CPU: what stands in for the CUDA runtime and driver, and the Python module.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "etap/launch.h"
#include "machine.h"

namespace py = pybind11;

namespace {

struct Runtime {
  std::vector<std::shared_ptr<ptx::Module>> modules;
  std::map<void const*, std::pair<ptx::Module const*, ptx::Kernel const*>> kernels;  // by host function
  ptx::Memory memory;
  ptx::Options options;
  std::vector<ptx::Milestone> milestones;
  int sms = 132;
  uint64_t steps = 0;
  std::string error;

  static Runtime& instance() {
    static Runtime* const runtime = new Runtime;
    return *runtime;
  }
};

// An uncompressed fat binary holds PTX as text.
std::string ptx_of(void const* wrapper) {
  struct Wrapper {
    int magic, version;
    void const* data;
    void* file;
  };
  auto const* data = static_cast<char const*>(static_cast<Wrapper const*>(wrapper)->data);
  struct Header {
    uint32_t magic;
    uint16_t version, header_bytes;
    uint64_t bytes;
  };
  Header header;
  std::memcpy(&header, data, sizeof header);
  std::string const all(data, header.header_bytes + header.bytes);
  size_t const begin = all.find(".version ");
  if (begin == std::string::npos) return "";
  return all.substr(begin, all.find('\0', begin) - begin);
}

}  // namespace

// ---- the CUDA runtime, as far as a launch needs it
extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  auto& runtime = Runtime::instance();
  try {
    runtime.modules.push_back(ptx::parse(ptx_of(wrapper)));
  } catch (std::exception const& e) {
    runtime.error = e.what();
    runtime.modules.push_back(std::make_shared<ptx::Module>());
  }
  return reinterpret_cast<void**>(runtime.modules.back().get());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void** module, char const* host, char*, char const* name, int, void*, void*, void*, void*,
                            int*) {
  auto const* found = reinterpret_cast<ptx::Module const*>(module);
  for (auto const& kernel : found->kernels) {
    if (kernel.name == name) Runtime::instance().kernels[host] = {found, &kernel};
  }
}
void __cudaRegisterVar(void**, char*, char*, char const*, int, size_t, int, int) {}
char __cudaInitModule(void**) { return 1; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }
cudaError_t cudaLaunchKernel(void const*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, void const* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaFuncSetAttribute(void const*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = Runtime::instance().sms, cudaSuccess;
}

// As the driver does, this refuses what TMA cannot load.
static CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                             cuuint64_t const* dims, cuuint64_t const* strides, cuuint32_t const* box,
                             cuuint32_t const* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  ptx::TensorMap made{};
  made.magic = ptx::TensorMap::kMagic;
  made.base = reinterpret_cast<uint64_t>(base);
  made.rank = uint16_t(rank);
  made.element_bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  bool good = rank >= 1 && rank <= 5 && made.base % 16 == 0 && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE;
  for (cuuint32_t d = 0; d < rank && good; ++d) {
    made.dims[d] = dims[d];
    made.box[d] = box[d];
    good = dims[d] >= 1 && dims[d] <= (1ull << 32) && box[d] >= 1 && box[d] <= 256 && steps[d] == 1;
    if (d > 0) {
      made.strides[d - 1] = strides[d - 1];
      good = good && strides[d - 1] % 16 == 0 && strides[d - 1] < (1ull << 40);
    }
  }
  uint32_t const inner = box[0] * made.element_bytes;
  made.swizzle = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 3
                 : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 2
                 : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 1
                                                        : 0;
  good = good && inner % 16 == 0 && (made.swizzle == 0 || inner <= 16u << made.swizzle);
  if (!good) return CUDA_ERROR_INVALID_VALUE;
  std::memset(map, 0, sizeof *map);
  std::memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(char const* name, void** symbol, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* found) {
  bool const known = std::string(name) == "cuTensorMapEncodeTiled";
  *symbol = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  *found = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(cudaLaunchConfig_t const* config, void const* host, void** args) {
  auto& runtime = Runtime::instance();
  auto const found = runtime.kernels.find(host);
  if (found == runtime.kernels.end()) {
    runtime.error = "launch of a kernel that is not there";
    return cudaErrorInvalidDeviceFunction;
  }
  ptx::Launch launch;
  launch.module = found->second.first;
  launch.kernel = found->second.second;
  launch.grid = config->gridDim.x;
  launch.block = config->blockDim.x;
  launch.shared_bytes = config->dynamicSmemBytes;
  launch.params.resize(launch.kernel->param_bytes);
  for (size_t n = 0; n < launch.kernel->params.size(); ++n) {
    auto const& p = launch.kernel->params[n];
    std::memcpy(launch.params.data() + p.offset, args[n], p.bytes);
  }
  try {
    ptx::Machine machine(launch, runtime.memory, runtime.options);
    machine.run();
    runtime.steps = machine.steps();
  } catch (std::exception const& e) {
    runtime.error = e.what();
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

char const* cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

}  // extern "C"

// ---- Python
namespace {

template <class T>
T* pointer(py::handle address) {
  return reinterpret_cast<T*>(address.is_none() ? 0 : address.cast<uint64_t>());
}

etap::RowStrides strides(py::handle three) {
  auto const s = three.cast<std::array<int64_t, 3>>();
  return {s[0], s[1], s[2]};
}

// Runs one launch. `fields`: MlaDecodeParams by name, pointers as integers. `memory`: (address, bytes, writable) of all
// that the kernel may touch. Raises RuntimeError for whatever goes wrong in it.
void run_mla_decode(py::dict fields, bool fp16, int cache, int row_tile, int p_parts, int num_ctas, uint64_t workspace,
                    std::vector<std::tuple<uint64_t, uint64_t, bool>> const& memory, uint64_t seed, bool check_races) {
  etap::MlaDecodeParams p{};
  p.batch = fields["batch"].cast<int>();
  p.num_heads = fields["num_heads"].cast<int>();
  p.q_len = fields["q_len"].cast<int>();
  p.cu_seqlens_q = pointer<int const>(fields["cu_seqlens_q"]);
  p.cache_seqlens = pointer<int const>(fields["cache_seqlens"]);
  p.causal = fields["causal"].cast<bool>();
  p.scale_log2 = fields["scale_log2"].cast<float>();
  p.q_nope = pointer<void const>(fields["q_nope"]);
  p.q_rope = pointer<void const>(fields["q_rope"]);
  p.q_nope_stride = strides(fields["q_nope_stride"]);
  p.q_rope_stride = strides(fields["q_rope_stride"]);
  p.ckv = pointer<void const>(fields["ckv"]);
  p.kpe = pointer<void const>(fields["kpe"]);
  p.ckv_page_stride = fields["ckv_page_stride"].cast<int64_t>();
  p.ckv_row_stride = fields["ckv_row_stride"].cast<int64_t>();
  p.kpe_page_stride = fields["kpe_page_stride"].cast<int64_t>();
  p.kpe_row_stride = fields["kpe_row_stride"].cast<int64_t>();
  p.num_pages = fields["num_pages"].cast<int>();
  p.page_size = fields["page_size"].cast<int>();
  p.capacity = fields["capacity"].cast<int>();
  p.page_table = pointer<int const>(fields["page_table"]);
  p.cache_batch_idx = pointer<int const>(fields["cache_batch_idx"]);
  p.page_table_stride = fields["page_table_stride"].cast<int64_t>();
  p.page_indptr = pointer<int const>(fields["page_indptr"]);
  p.max_pages = fields["max_pages"].cast<int>();
  p.ckv_scale = fields["ckv_scale"].cast<float>();
  p.kpe_scale = fields["kpe_scale"].cast<float>();
  p.ckv_scale_data = pointer<float const>(fields["ckv_scale_data"]);
  p.kpe_scale_data = pointer<float const>(fields["kpe_scale_data"]);
  p.ckv_scale_stride = fields["ckv_scale_stride"].cast<int64_t>();
  p.kpe_scale_stride = fields["kpe_scale_stride"].cast<int64_t>();
  p.out = pointer<void>(fields["out"]);
  p.out_stride = strides(fields["out_stride"]);
  p.out_fp32 = fields["out_fp32"].cast<bool>();
  p.lse = pointer<float>(fields["lse"]);
  p.lse_stride = strides(fields["lse_stride"]);
  p.lse_unit = fields["lse_unit"].cast<float>();
  p.workspace = reinterpret_cast<void*>(workspace);
  p.group_scale = pointer<float const>(fields["group_scale"]);
  p.group_scale_page_stride = fields["group_scale_page_stride"].cast<int64_t>();
  p.group_scale_row_stride = fields["group_scale_row_stride"].cast<int64_t>();

  auto& runtime = Runtime::instance();
  if (!runtime.error.empty()) throw std::runtime_error(runtime.error);
  runtime.memory = {};
  for (auto const& [begin, bytes, writable] : memory) runtime.memory.allow(begin, bytes, writable);
  runtime.memory.allow(workspace, etap::workspace_bytes(num_ctas, row_tile), true);
  runtime.options.seed = seed;
  runtime.options.check_races = check_races;

  etap::LaunchConfig config;
  config.dtype = fp16 ? etap::Dtype::kFp16 : etap::Dtype::kBf16;
  config.cache = etap::CacheFormat(cache);
  config.row_tile = row_tile;
  config.p_parts = p_parts;
  config.num_ctas = num_ctas;
  cudaError_t const status = etap::launch_mla_decode(p, config, nullptr);
  if (status != cudaSuccess) {
    std::string what;
    std::swap(what, runtime.error);
    throw std::runtime_error(what.empty() ? "launch failed: " + std::to_string(status) : what);
  }
}

// Puts another text in a module's place.
void replace_module(size_t index, std::string const& text) {
  auto& runtime = Runtime::instance();
  auto const made = ptx::parse(text);
  auto& old = runtime.modules.at(index);
  for (auto& [host, found] : runtime.kernels) {
    if (found.first != old.get()) continue;
    for (auto const& kernel : made->kernels) {
      if (kernel.name == found.second->name) found.second = &kernel;
    }
    found.first = made.get();
  }
  old = made;
}

}  // namespace

PYBIND11_MODULE(_interpreter, m) {
  m.doc() = "Runs the compiled ETAP kernels' PTX on the CPU.";
  m.def("mla_decode", &run_mla_decode);
  m.def("row_tile_for", [](int64_t rows, int cache) {
    return etap::row_tile_for(rows, static_cast<etap::CacheFormat>(cache));
  });
  m.def("workspace_bytes", &etap::workspace_bytes);
  m.def("header_bytes", [] { return etap::kWorkspaceHeaderBytes; });
  m.def("default_p_parts", [](int cache, int sms) {
    return etap::default_p_parts(static_cast<etap::CacheFormat>(cache), sms);
  });
  m.def("texts", [] {
    std::vector<std::string> texts;
    for (auto const& module : Runtime::instance().modules) texts.push_back(module->text);
    return texts;
  });
  m.def("replace", &replace_module);
  m.def("watch", [](int cta) {
    auto& runtime = Runtime::instance();
    runtime.milestones.clear();
    runtime.options.watched_cta = cta;
    runtime.options.milestones = &runtime.milestones;
  });
  m.def("milestones", [] {
    std::vector<std::tuple<int, uint64_t, std::string>> found;
    for (auto const& x : Runtime::instance().milestones) found.emplace_back(x.warp, x.executed, x.instruction);
    return found;
  });
  m.def("steps", [] { return Runtime::instance().steps; });
  m.def("load_error", [] { return Runtime::instance().error; });
  m.def("num_kernels", [] { return Runtime::instance().kernels.size(); });
}
