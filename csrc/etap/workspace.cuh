// Partial results on their way from the CTA that has them to those that merge them, through L2.
//
// The words validate themselves, and a reader polls until they are there. (A fence and a flag instead measured slower.)
// Launches use two buffers in turn. A word of statistics holds kUnwritten until it is stored; each launch erases those
// that the one before it left in the other buffer, while it waits for memory (erasing what was read measured 1 to 2 us
// slower). The last bit of a word of O^T tells a launch from the one that used the buffer before it, so that what
// launch after launch stores anew need not be erased: with 16 rows 0.3 to 1 us, with 32 rows 1 to 2, measured. A slot
// that a launch of its buffer leaves alone is erased before the next.
#pragma once

#include "storage.cuh"

namespace etap {

// The mark of one launch's words of O^T, in their last bit.
struct Tag {
  uint32_t bit;

  ETAP_DEVICE float put(float x) const {  // volatile: else O^T is read before the wait for it
    asm volatile("and.b32 %0, %0, 0xfffffffe;\n\tor.b32 %0, %0, %1;" : "+f"(x) : "r"(bit));
    return x;
  }
  // The word without the mark: even, unless it is another launch's. Of one erased, that or no number.
  ETAP_DEVICE uint32_t take(float x) const { return __float_as_uint(x) ^ bit; }
  ETAP_DEVICE bool written(float x) const { return !(take(x) & 1) && etap::written(x); }
  ETAP_DEVICE bool written(float4 v) const { return written(v.x) && written(v.y) && written(v.z) && written(v.w); }
};

// The buffer of one launch: two slots a CTA.
template <class Cfg>
struct PartialBuffer {
  static constexpr int kSlotBytes = slot_bytes(Cfg::kRowTile);
  uint8_t* base;
  Tag tag;

  ETAP_DEVICE PartialBuffer(MlaDecodeParams const& p, uint32_t epoch)
      : base(static_cast<uint8_t*>(p.workspace) + kWorkspaceHeaderBytes +
             (epoch & 1) * (2 * gridDim.x) * uint64_t(kSlotBytes)),
        tag{epoch >> 1 & 1} {}

  // O^T (partial.cuh).
  ETAP_DEVICE float4* quads(int slot) const { return reinterpret_cast<float4*>(base + int64_t(slot) * kSlotBytes); }
  // Of each row, the reference maximum (log2 units) and the sum under it.
  ETAP_DEVICE float2* stats(int slot) const {
    return reinterpret_cast<float2*>(base + (int64_t(slot) * kSlotBytes + partial_bytes(Cfg::kRowTile)));
  }
};

ETAP_DEVICE WorkspaceHeader* workspace_header(MlaDecodeParams const& p) {
  return static_cast<WorkspaceHeader*>(p.workspace);
}
ETAP_DEVICE uint32_t read_epoch(MlaDecodeParams const& p) {
  return *reinterpret_cast<uint32_t const volatile*>(p.workspace);
}

// Notes that this CTA writes a slot.
ETAP_DEVICE void mark_used(MlaDecodeParams const& p, uint32_t epoch, int slot) {
  workspace_header(p)->slots[slot / 2][epoch & 1][slot & 1] = SlotState::kUsed;
}

template <int Bytes>
ETAP_DEVICE void erase(void* from, int lane) {
  float const unwritten = __uint_as_float(kUnwritten);
#pragma unroll 4
  for (int i = lane; i < Bytes / 16; i += 32) {
    static_cast<float4*>(from)[i] = make_float4(unwritten, unwritten, unwritten, unwritten);
  }
}

// Erases what the launch before must not leave to the next in the slots of this CTA's number, and counts the CTA as
// done with the epoch; the last one ends it. One warp calls this, off the critical path.
template <class Cfg>
ETAP_DEVICE void turn_workspace(MlaDecodeParams const& p, uint32_t epoch, int lane) {
  WorkspaceHeader* const header = workspace_header(p);
  auto& states = header->slots[blockIdx.x][~epoch & 1];
  PartialBuffer<Cfg> const buffer(p, ~epoch);
  ETAP_ROLLED
  for (int i = 0; i < 2; ++i) {
    SlotState const state = states[i];
    int const slot = 2 * blockIdx.x + i;
    if (state == SlotState::kUsed) erase<stats_bytes(Cfg::kRowTile)>(buffer.stats(slot), lane);
    if (state == SlotState::kLeft) erase<partial_bytes(Cfg::kRowTile)>(buffer.quads(slot), lane);
    __syncwarp();
    if (lane == 0) states[i] = state == SlotState::kUsed ? SlotState::kLeft : SlotState::kErased;
  }
  if (lane == 0 && atomicAdd(&header->readers, 1) == gridDim.x - 1) {
    header->readers = 0;
    header->epoch = epoch + 1;
  }
}

}  // namespace etap
