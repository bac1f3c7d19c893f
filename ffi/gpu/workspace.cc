#include "gpu/kernel/layout/workspace.h"

#include <algorithm>

#include "gpu/request.h"

namespace monokernel::gpu {

WorkspaceSize workspace_size(const Request& request) {
  const Program& p = request.program;
  mk::Dims dims{};
  dims.batch = request.batch;
  dims.units = p.units;
  dims.splits = request.splits;
  dims.hidden = p.hidden_size;
  dims.q_size = p.q_size();
  dims.qkv_size = p.q_size() + 2 * p.kv_size();
  dims.heads = p.num_heads;
  dims.vocab = p.vocab_size;
  dims.groups = p.groups;
  dims.attention_groups = p.attention_groups;
  dims.mlp_groups = p.mlp_groups;
  dims.inner_cols = p.inner_cols;
  dims.dies = request.placed ? mk::kDies : p.groups > 1 ? p.groups : 0;
  // What the kernel needs at most: it keeps in shared memory what fits there. They come last, so all that it needs is within this.
  dims.own_residual = p.post_norm ? request.batch * p.hidden_size : 0;
  dims.own_angles = request.batch * std::max<int64_t>(1, p.num_ropes) * p.rotary_dim;
  if (mk::has_packed_hand_offs(p.groups == 1 && p.wave_size == 32 && p.weight_dtype != kF16 && !p.post_norm, request.batch)) {
    int64_t most = 0;
    for (int64_t u = 0; u < p.units; u++) most = std::max(most, p.tile(kO, u).count);
    dims.packed_bytes = p.weight_dtype == kF32 ? 4 : 2;
    dims.square_words = mk::square_words(request.batch, p.tile_rows, p.wave_size, p.service_waves, most);
  }
  const mk::Workspace w = mk::make_workspace(dims);
  return {w.bytes, w.exchange_bytes};
}

int64_t trace_bytes(const Request& request) {
  constexpr int64_t kUnitBytes = 2 * 32768;  // no less than kernel/service.h fills
  return request.trace ? request.program.units * kUnitBytes : 0;
}

}  // namespace monokernel::gpu
