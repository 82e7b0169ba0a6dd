// Partial results on their way from the CTA that has them to those that merge them, through L2.
//
// The words validate themselves: they hold kUnwritten until a result is stored, and a reader polls until it is there.
// (A fence and a flag instead measured slower.) Launches use the two buffers in turn, and each erases what the one
// before it left in the other, while it waits for memory: erasing what was read measured 1 to 2 us slower.
#pragma once

#include "storage.cuh"

namespace etap {

// The buffer of one launch: two slots a CTA.
template <class Cfg>
struct PartialBuffer {
  static constexpr int kSlotBytes = slot_bytes(Cfg::kRowTile);
  uint8_t* base;
  int stats_at;  // in a slot

  ETAP_DEVICE PartialBuffer(MlaDecodeParams const& p, uint32_t epoch, bool packed)
      : base(static_cast<uint8_t*>(p.workspace) + kWorkspaceHeaderBytes +
             (epoch & 1) * (2 * gridDim.x) * uint64_t(kSlotBytes)),
        stats_at(partial_bytes(Cfg::kRowTile, packed)) {}

  // O^T in units (partial.cuh).
  ETAP_DEVICE float4* units(int slot) const { return reinterpret_cast<float4*>(base + int64_t(slot) * kSlotBytes); }
  // Of each row, the reference maximum (log2 units) and the sum under it.
  ETAP_DEVICE float2* stats(int slot) const {
    return reinterpret_cast<float2*>(base + (int64_t(slot) * kSlotBytes + stats_at));
  }
};

ETAP_DEVICE WorkspaceHeader* workspace_header(MlaDecodeParams const& p) {
  return static_cast<WorkspaceHeader*>(p.workspace);
}
ETAP_DEVICE uint32_t read_epoch(MlaDecodeParams const& p) {
  return *reinterpret_cast<uint32_t const volatile*>(p.workspace);
}

// Notes that this CTA writes a slot of its own, for the next launch to erase.
ETAP_DEVICE void mark_dirty(MlaDecodeParams const& p, uint32_t epoch, int slot, bool packed) {
  workspace_header(p)->dirty[slot / 2][epoch & 1][slot & 1] = packed ? 1 : 2;
}

// Erases what this CTA wrote in the launch before, and counts the CTA as done with the epoch; the last one ends it.
// One warp calls this, off the critical path.
template <class Cfg>
ETAP_DEVICE void turn_workspace(MlaDecodeParams const& p, uint32_t epoch, int lane) {
  WorkspaceHeader* const header = workspace_header(p);
  auto& dirty = header->dirty[blockIdx.x][~epoch & 1];
  PartialBuffer<Cfg> const buffer(p, ~epoch, false);
  float const unwritten = __uint_as_float(kUnwritten);
  ETAP_ROLLED
  for (int slot = 0; slot < 2; ++slot) {
    if (!dirty[slot]) continue;
    float4* const words = buffer.units(2 * blockIdx.x + slot);
    int const bytes = partial_bytes(Cfg::kRowTile, dirty[slot] == 1) + stats_bytes(Cfg::kRowTile);
#pragma unroll 4
    for (int i = lane; i < bytes / 16; i += 32) {
      words[i] = make_float4(unwritten, unwritten, unwritten, unwritten);
    }
  }
  __syncwarp();
  if (lane == 0) {
    dirty[0] = dirty[1] = 0;
    if (atomicAdd(&header->readers, 1) == gridDim.x - 1) {
      header->readers = 0;
      header->epoch = epoch + 1;
    }
  }
}

}  // namespace etap
