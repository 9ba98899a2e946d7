"""causal: written by einscade for the cascade

    cascade causal(Q[b,h,p,e]: bf16, K[b,g,m,e]: bf16, V[b,g,m,f]: bf16) -> O[b,h,p,f]: bf16
      where b < B, h < 32, p < P, f < 128, e < 128, m < M, g < 8, m1 < ceil_div(M, M0) of m, m0 < M0 of m
      S[b,h,p,m1,m0]   = sum(e) 0.088388347648318 * K[b,h // 4,m1*M0 + m0,e] * Q[b,h,p,e]   if m0 + m1*M0 < M & m0 + m1*M0 <= p
      GL[b,h,p,m1]     = max(m0) S[b,h,p,m1,m0]
      G[b,h,p,m1]      = Max(GL[b,h,p,m1], G[b,h,p,m1 - 1])   along m1 from -oo
      W[b,h,p,m1,m0]   = exp(S[b,h,p,m1,m0] - G[b,h,p,m1])
      ZL[b,h,p,m1]     = sum(m0) W[b,h,p,m1,m0]
      Z[b,h,p,m1]      = Z[b,h,p,m1 - 1] * exp(G[b,h,p,m1 - 1] - G[b,h,p,m1]) + ZL[b,h,p,m1]   along m1 from 0
      NL[b,h,p,m1,f]   = sum(m0) V[b,h // 4,m1*M0 + m0,f] * W[b,h,p,m1,m0]
      N[b,h,p,m1,f]    = N[b,h,p,m1 - 1,f] * exp(G[b,h,p,m1 - 1] - G[b,h,p,m1]) + NL[b,h,p,m1,f]   along m1 from 0
      O[b,h,p,f]: bf16 = N[b,h,p,(M - 1) // M0,f] / Z[b,h,p,(M - 1) // M0]   if Z[b,h,p,(M - 1) // M0] != 0
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


GROUPS = gl.constexpr(2)  # warpgroups of 64 rows of p
STEP = gl.constexpr(128)  # of m, an iteration
STAGES = gl.constexpr(2)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
RESULT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, RESULT, 2))
ROW = gl.constexpr(gl.SliceLayout(1, SCORES))
COLUMN = gl.constexpr(gl.SliceLayout(0, SCORES))
RESULT_ROW = gl.constexpr(gl.SliceLayout(1, RESULT))
TILE_128 = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))


@gluon.jit
def settled(x):
    """x + -0, which is x. The assembler (CUDA 12.8) drops the products of a sum whose first reader after the loop is a
    bit operation, as the change of a sign is."""
    return gl.inline_asm_elementwise("add.f32 $0, $1, 0f80000000;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def hold(x):
    """What waits for products behind this does so once x, a value a row, is known. The assembler moves such waits up,
    in front of work that is to run meanwhile, but not across a barrier; to this one nobody ever comes, as no maximum
    has a signalling NaN's bits. A thread has two rows."""
    text: gl.constexpr = (
        "{ .reg .pred p; .reg .b32 t; max.f32 t, $2, $3; setp.eq.s32 p, t, 0x7f800001; @p bar.arrive 15, 256; "
        "mov.b32 $0, 0; mov.b32 $1, 0; }"
    )
    gl.inline_asm_elementwise(text, "=r,=r,r,r", [x], gl.int32, is_pure=False, pack=2)


@gluon.jit
def finite(x):
    """x, or 0 where a row had no points: the reference of an exponential."""
    return gl.where(gl.abs(x) == float("inf"), 0.0, x)


@gluon.jit
def row_parts(x):
    """Sums along rows as far as a thread goes alone: eight parts a row, in independent chains of additions."""
    return gl.sum(x.reshape([64, STEP // 8, 8]), axis=1)


@gluon.jit
def row_max(x):
    """Eight parts a row first: chains of maxima that do not wait for each other."""
    return gl.convert_layout(gl.max(gl.max(x.reshape([64, STEP // 8, 8]), axis=1), axis=1), ROW)


@gluon.constexpr_function
def barrier(instruction, group):
    return f"bar.{instruction} {8 + group % GROUPS.value}, 256; mov.u32 $0, 0;"


@gluon.jit
def take_turn(group: gl.constexpr):
    """Wait until the warpgroup before this one has issued its products."""
    text: gl.constexpr = barrier("sync", group)
    gl.inline_asm_elementwise(text, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pass_turn(group: gl.constexpr):
    text: gl.constexpr = barrier("arrive", group + 1)
    gl.inline_asm_elementwise(text, "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def place(B, M, P):
    """The program's place in the grid, and the tiles of m it visits: `first <= tile < end`."""
    row_tiles = gl.cdiv(P, 128)
    program = gl.program_id(0)
    rest = program % (4 * row_tiles)  # neighbours share what the loop reads
    batch = program // (4 * row_tiles) * 4 + rest % 4
    row_tile = rest // 4
    row_tile = row_tiles - 1 - row_tile  # the longest loops first
    row = row_tile * 128
    h = batch % 32
    batch = batch // 32
    b = batch
    first = 0
    end = (127 + gl.maximum(1, gl.minimum(M, (128 + row)))) // 128
    first = gl.minimum(first, end - 1)
    return b, h, row, first, end


@gluon.jit
def load(Q_map, K_map, V_map, Q_tile, K_tiles, V_tiles, Q_full, K_full, K_empty, V_full, V_empty, b, h, row,
         first, end):
    """The loading warp: all of a program's tiles of Q, K and V, in the order they are read."""
    mbarrier.expect(K_full.index(0), K_map.block_type.nbytes)
    tma.async_copy_global_to_shared(K_map, [b, h // 4, (end - 1) * STEP, 0], K_full.index(0), K_tiles.index(0))
    mbarrier.expect(Q_full, GROUPS * Q_map.block_type.nbytes)
    for group in gl.static_range(GROUPS):
        at = [b, h, row + group * 64, 0]
        tma.async_copy_global_to_shared(Q_map, at, Q_full, Q_tile.index(group))
    stage = 0
    phase = 1
    for tile in range(end - 1 - first):
        next_stage = stage + 1
        next_phase = phase
        if next_stage == STAGES:
            next_stage = 0
            next_phase = phase ^ 1
        mbarrier.wait(K_empty.index(next_stage), next_phase)
        mbarrier.expect(K_full.index(next_stage), K_map.block_type.nbytes)
        tma.async_copy_global_to_shared(K_map, [b, h // 4, (end - 2 - tile) * STEP, 0], K_full.index(next_stage), K_tiles.index(next_stage))
        mbarrier.wait(V_empty.index(stage), phase)
        mbarrier.expect(V_full.index(stage), V_map.block_type.nbytes)
        tma.async_copy_global_to_shared(V_map, [b, h // 4, (end - 1 - tile) * STEP, 0], V_full.index(stage), V_tiles.index(stage))
        stage = next_stage
        phase = next_phase
    mbarrier.wait(V_empty.index(stage), phase)
    mbarrier.expect(V_full.index(stage), V_map.block_type.nbytes)
    tma.async_copy_global_to_shared(V_map, [b, h // 4, first * STEP, 0], V_full.index(stage), V_tiles.index(stage))


@gluon.jit
def weigh(S, G, Z, m_first, p_, b, h, B, M, P, MASKED: gl.constexpr):
    """From a tile of scores to weights; the running values before it to those after it."""
    m_ = m_first + gl.arange(0, STEP, COLUMN)
    # S[b,h,p,m1,m0] = sum(e) 0.088388347648318 * K[b,h // 4,m1*M0 + m0,e] * Q[b,h,p,e]   if m0 + m1*M0 < M & m0 +
    #   m1*M0 <= p
    if MASKED:
        keep = m_[None, :] <= gl.minimum(p_, (M - 1))[:, None]
        S = gl.where(keep, S, float("-inf"))
    # GL[b,h,p,m1] = max(m0) S[b,h,p,m1,m0]
    GL = row_max(S)
    # G[b,h,p,m1] = Max(GL[b,h,p,m1], G[b,h,p,m1 - 1])   along m1 from -oo
    G_new = gl.maximum(G, GL)
    if MASKED:
        G_ref = finite(G_new)
    else:
        G_ref = G_new
    # W[b,h,p,m1,m0] = exp(S[b,h,p,m1,m0] - G[b,h,p,m1])
    W = gl.exp2(S * 0.12751743082459804 - (G_ref * 0.12751743082459804)[:, None])
    # ZL[b,h,p,m1] = sum(m0) W[b,h,p,m1,m0]
    ZL = row_parts(W)
    C = gl.exp2(G * 0.12751743082459804 - (G_ref * 0.12751743082459804))
    # Z[b,h,p,m1] = Z[b,h,p,m1 - 1] * exp(G[b,h,p,m1 - 1] - G[b,h,p,m1]) + ZL[b,h,p,m1]   along m1 from 0
    Z_new = Z * gl.convert_layout(C, gl.SliceLayout(1, Z.type.layout))[:, None] + ZL
    rescale = C
    return G_new, Z_new, rescale, gl.convert_layout(W.to(gl.bfloat16), WEIGHTS)


@gluon.jit
def advance(tile, G, Z, N, weights, stage, phase, Q_tile, K_tiles, V_tiles, K_full, K_empty, V_full, V_empty,
            zero, p_, b, h, B, M, P, MASKED: gl.constexpr, group: gl.constexpr):
    """One iteration: the next scores are issued before the last weights meet their values."""
    last_stage = stage
    last_phase = phase
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    mbarrier.wait(K_full.index(stage), phase)
    take_turn(group)
    K_tile = K_tiles.index(stage)._reinterpret(gl.bfloat16, [128, 128], TILE_128).permute([1, 0])
    next_S = warpgroup_mma(Q_tile, K_tile, zero, use_acc=False, is_async=True)
    mbarrier.wait(V_full.index(last_stage), last_phase)
    V_tile = V_tiles.index(last_stage)._reinterpret(gl.bfloat16, [128, 128], TILE_128)
    next_N = warpgroup_mma(weights, V_tile, N, is_async=True)
    pass_turn(group)
    S = warpgroup_mma_wait(1, deps=[next_S])
    mbarrier.arrive(K_empty.index(stage))
    G, Z, rescale, next_weights = weigh(S, G, Z, tile * STEP, p_, b, h, B, M, P, MASKED)
    hold(G)
    N, weights = warpgroup_mma_wait(0, deps=[next_N, weights])
    mbarrier.arrive(V_empty.index(last_stage))
    N = N * gl.convert_layout(rescale, RESULT_ROW)[:, None]
    return G, Z, N, next_weights, stage, phase


@gluon.jit
def compute(O_map, Q_tile, K_tiles, V_tiles, Q_full, K_full, K_empty, V_full, V_empty, b, h, row, first, end, B,
            M, P, group: gl.constexpr):
    """A warpgroup: 64 rows of p, all of their loop, and what follows it."""
    p_ = row + group * 64 + gl.arange(0, 64, ROW)
    zero = gl.full([64, STEP], 0.0, gl.float32, SCORES)
    G = gl.full([64], float("-inf"), gl.float32, ROW)
    Z = row_parts(zero)
    N = gl.full([64, 128], 0.0, gl.float32, RESULT)
    tile = end - 1
    if group == GROUPS - 1:
        pass_turn(group)  # the first turn is the first warpgroup's
    mbarrier.wait(Q_full, 0)
    Q_rows = Q_tile.index(group)._reinterpret(gl.bfloat16, [64, 128], TILE_128)
    mbarrier.wait(K_full.index(0), 0)
    take_turn(group)
    K_tile = K_tiles.index(0)._reinterpret(gl.bfloat16, [128, 128], TILE_128).permute([1, 0])
    S = warpgroup_mma(Q_rows, K_tile, zero, use_acc=False, is_async=True)
    pass_turn(group)
    S = warpgroup_mma_wait(0, deps=[S])
    mbarrier.arrive(K_empty.index(0))
    G, Z, rescale, weights = weigh(S, G, Z, tile * STEP, p_, b, h, B, M, P, True)
    stage = 0
    phase = 0
    for _ in range(end - 1 - first):
        tile -= 1
        G, Z, N, weights, stage, phase = advance(tile, G, Z, N, weights, stage, phase, Q_rows, K_tiles, V_tiles,
            K_full, K_empty, V_full, V_empty, zero, p_, b, h, B, M, P, False, group)
    mbarrier.wait(V_full.index(stage), phase)
    V_tile = V_tiles.index(stage)._reinterpret(gl.bfloat16, [128, 128], TILE_128)
    N = warpgroup_mma(weights, V_tile, N, is_async=True)
    N, weights = warpgroup_mma_wait(0, deps=[N, weights])
    N = settled(N)
    p_ = gl.convert_layout(p_, RESULT_ROW)
    Z = gl.convert_layout(gl.sum(Z, axis=1), RESULT_ROW)
    # O[b,h,p,f]: bf16 = N[b,h,p,(M - 1) // M0,f] / Z[b,h,p,(M - 1) // M0]   if Z[b,h,p,(M - 1) // M0] != 0
    O = gl.where((Z != 0)[:, None], (N * (1.0 / Z)[:, None]), 0.0)
    Q_rows.store(O.to(gl.bfloat16))
    fence_async_shared()
    at = [b, h, row + group * 64, 0]
    tma.async_copy_shared_to_global(O_map, at, Q_tile.index(group))
    tma.store_wait(0)


@gluon.jit(do_not_specialize=['B', 'M', 'P'])
def kernel(Q_map, K_map, V_map, O_map, B, M, P):
    Q_tile = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, 1, 1, 64, 128], Q_map.layout)
    K_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, 128, 128], K_map.layout)
    V_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, 1, 1, 128, 128], V_map.layout)
    Q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    K_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    K_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    V_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    V_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(Q_full, 1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(K_full.index(stage), 1)
        mbarrier.init(K_empty.index(stage), GROUPS)
        mbarrier.init(V_full.index(stage), 1)
        mbarrier.init(V_empty.index(stage), GROUPS)
    b, h, row, first, end = place(B, M, P)
    gl.warp_specialize(
        [
            (compute, (O_map, Q_tile, K_tiles, V_tiles, Q_full, K_full, K_empty, V_full, V_empty, b, h, row, first,
             end, B, M, P, 0)),
            (compute, (O_map, Q_tile, K_tiles, V_tiles, Q_full, K_full, K_empty, V_full, V_empty, b, h, row, first,
             end, B, M, P, 1)),
            (load, (Q_map, K_map, V_map, Q_tile, K_tiles, V_tiles, Q_full, K_full, K_empty, V_full, V_empty, b, h,
             row, first, end)),
        ],
        [4, 1],
        [240, 24],
    )


def copyable(x: torch.Tensor) -> bool:
    """Whether the copy engine can take a tensor's address and strides."""
    size = x.element_size()
    fits = all(n == 1 or (s > 0 and s * size % 16 == 0) for n, s in zip(x.shape[:-1], x.stride()[:-1]))
    return fits and x.data_ptr() % 16 == 0 and x.stride(-1) == 1


def tile_map(x: torch.Tensor, rows: int, width: int) -> TensorDescriptor:
    """The copy engine's view of x as tiles of its last two dimensions; of a copy where its strides or address are
    none that the engine can take."""
    if x.numel() == 0:
        x = x.new_zeros([max(1, n) for n in x.shape])
    if not copyable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    size = x.element_size()
    strides = [s if n > 1 else -(-x.shape[-1] * size // 16) * 16 // size for n, s in zip(x.shape, x.stride())]
    layout = gl.NVMMASharedLayout(min(128, width * size), 8 * size, x.dim())
    block = [1] * (x.dim() - 2) + [rows, width]
    return TensorDescriptor(x, list(x.shape), strides[:-1] + [1], block, layout)


def run(Q, K, V, *, B, M, P) -> tuple[torch.Tensor, ...]:
    """causal: inputs with any strides; sizes by name."""
    O = torch.empty(B, 32, P, 128, dtype=torch.bfloat16, device=Q.device)
    programs = B * 32 * -(-P // 128)
    if programs:
        kernel[(programs,)](
            tile_map(Q, 64, 128),
            tile_map(K, 128, 128),
            tile_map(V, 128, 128),
            tile_map(O, 64, 128),
            B, M, P,
            num_warps=4,
        )
    return O,
