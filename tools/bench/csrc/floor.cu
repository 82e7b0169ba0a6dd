// The memory floor: streams a buffer from device memory into shared memory through bulk copies and touches nothing else.
// One CTA per SM, one thread each, a ring of chunks in flight. No kernel that reads these bytes can be faster.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kChunkBytes = 8192;
constexpr int kMaxStages = 26;  // as many chunks as fit an SM's shared memory

__device__ __forceinline__ uint32_t shared_address(void const* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)));
}

__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t phase) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(phase)
        : "memory");
}

__device__ __forceinline__ void copy_chunk(char* destination, char const* source, uint64_t* barrier) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(kChunkBytes));
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            shared_address(destination)),
        "l"(source), "r"(kChunkBytes), "r"(shared_address(barrier))
        : "memory");
}

__global__ void __launch_bounds__(32) stream_bytes(char const* source, size_t num_chunks, int stages) {
    extern __shared__ __align__(1024) char ring[];
    __shared__ uint64_t arrived[kMaxStages];
    if (threadIdx.x != 0) {
        return;
    }
    for (int stage = 0; stage < stages; ++stage) {
        barrier_init(&arrived[stage]);
    }
    asm volatile("fence.mbarrier_init.release.cluster;");

    size_t next = blockIdx.x;
    int load_stage = 0;
    auto issue = [&] {
        copy_chunk(ring + load_stage * kChunkBytes, source + next * kChunkBytes, &arrived[load_stage]);
        next += gridDim.x;
        load_stage = load_stage + 1 == stages ? 0 : load_stage + 1;
    };
    for (int stage = 0; stage < stages && next < num_chunks; ++stage) {
        issue();
    }
    int wait_stage = 0;
    uint32_t phase = 0;
    for (size_t chunk = blockIdx.x; chunk < num_chunks; chunk += gridDim.x) {
        barrier_wait(&arrived[wait_stage], phase);
        if (++wait_stage == stages) {
            wait_stage = 0;
            phase ^= 1;
        }
        if (next < num_chunks) {
            issue();
        }
    }
}

}  // namespace

// Reads `bytes` (rounded down to 8 KB) from `source` with `ctas` CTAs and `stages` chunks in flight in each.
extern "C" int mb_rdbulk(void* source, size_t bytes, int ctas, int stages, cudaStream_t stream) {
    if (stages < 1 || stages > kMaxStages) {
        return static_cast<int>(cudaErrorInvalidValue);
    }
    int const shared_bytes = stages * kChunkBytes;
    if (cudaError_t error =
            cudaFuncSetAttribute(stream_bytes, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) {
        return static_cast<int>(error);
    }
    stream_bytes<<<ctas, 32, shared_bytes, stream>>>(static_cast<char const*>(source), bytes / kChunkBytes, stages);
    return static_cast<int>(cudaGetLastError());
}
