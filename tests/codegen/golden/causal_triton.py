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
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


def described(tensor: torch.Tensor, block: tuple[int, ...]) -> tuple[torch.Tensor | TensorDescriptor, bool]:
    """The tensor for the copy engine, and True; the tensor itself where its address or strides are none for it."""
    strides = [s * tensor.element_size() for s in tensor.stride()[:-1]]
    fits = tensor.is_cuda and tensor.stride(-1) == 1 and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0
    if not fits or any(s % 16 or s <= 0 for s in strides):
        return tensor, False
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(block)), True


@triton.jit
def finite_or_zero(x):
    """A maximum over nothing is -inf; as the reference of an exponential it must not be."""
    return tl.where(tl.abs(x) == float("inf"), 0.0, x)


@triton.jit
def causal_step(
    G, Z, N, p, h, b, e, f, Q_tile, K, V, K_b, K_g, K_m, K_e, V_b, V_g, V_m, V_f, K_TMA: tl.constexpr,
    V_TMA: tl.constexpr, M, m_lo, MASKED: tl.constexpr
):
    """One tile along m of causal_kernel: the values of G, Z, N after it."""
    m = m_lo + tl.arange(0, 64)
    m_there = (m < M) if MASKED else tl.full([64], True, tl.int1)
    # S[b,h,p,m1,m0] = sum(e) 0.088388347648318 * K[b,h // 4,m1*M0 + m0,e] * Q[b,h,p,e]   if m0 + m1*M0 < M & m0 +
    #   m1*M0 <= p
    if K_TMA:
        K_tile = K.load([b, h // 4, m_lo, 0]).reshape(64, 128)
    else:
        K_at = K + b.to(tl.int64) * K_b + (h // 4).to(tl.int64) * K_g
        K_tile = tl.load(K_at + m[:, None].to(tl.int64) * K_m + e[None, :] * K_e, mask=m_there[:, None], other=0)
    S = tl.dot(Q_tile, tl.trans(K_tile))
    if MASKED:
        keep = (m[None, :] <= p[:, None]) & (m < M)[None, :]
        S = tl.where(keep, S, float("-inf"))
    # GL[b,h,p,m1] = max(m0) S[b,h,p,m1,m0]
    GL = tl.max(S, 1)
    # G[b,h,p,m1] = Max(GL[b,h,p,m1], G[b,h,p,m1 - 1])   along m1 from -oo
    G_new = tl.maximum(G, GL)
    G_ref = finite_or_zero(G_new)
    # W[b,h,p,m1,m0] = exp(S[b,h,p,m1,m0] - G[b,h,p,m1])
    W = tl.exp2(S * 0.12751743082459804 - (G_ref * 0.12751743082459804)[:, None])
    # ZL[b,h,p,m1] = sum(m0) W[b,h,p,m1,m0]
    ZL = tl.sum(W, 1)
    C = tl.exp2(G * 0.12751743082459804 - G_ref * 0.12751743082459804)
    # Z[b,h,p,m1] = Z[b,h,p,m1 - 1] * exp(G[b,h,p,m1 - 1] - G[b,h,p,m1]) + ZL[b,h,p,m1]   along m1 from 0
    Z_new = C * Z + ZL
    # N[b,h,p,m1,f] = N[b,h,p,m1 - 1,f] * exp(G[b,h,p,m1 - 1] - G[b,h,p,m1]) + NL[b,h,p,m1,f]   along m1 from 0
    N_new = N * C[:, None]
    # NL[b,h,p,m1,f] = sum(m0) V[b,h // 4,m1*M0 + m0,f] * W[b,h,p,m1,m0]
    if V_TMA:
        V_tile = V.load([b, h // 4, m_lo, 0]).reshape(64, 128)
    else:
        V_at = V + b.to(tl.int64) * V_b + (h // 4).to(tl.int64) * V_g
        V_tile = tl.load(V_at + m[:, None].to(tl.int64) * V_m + f[None, :] * V_f, mask=m_there[:, None], other=0)
    N_new = tl.dot(W.to(tl.bfloat16), V_tile, N_new)
    return G_new, Z_new, N_new


@triton.jit
def causal_kernel(
    Q, K, V, O, Q_b, Q_h, Q_p, Q_e, K_b, K_g, K_m, K_e, V_b, V_g, V_m, V_f, M, P, K_TMA: tl.constexpr,
    V_TMA: tl.constexpr
):
    """O: a program is one tile of p at one b, h, and loops along m."""
    O_f = 1
    O_p = 128
    O_h = tl.cast(P, tl.int64) * 128
    O_b = O_h * 32
    program = tl.program_id(0)
    p_tiles = tl.cdiv(P, 128)
    p_tile = p_tiles - 1 - program % p_tiles  # the tiles with most to do first
    program = program // p_tiles
    p_lo = p_tile * 128
    p_hi = tl.minimum(p_lo + 128, P)
    p = p_lo + tl.arange(0, 128)
    h = program % 32
    program = program // 32
    b = program
    e = tl.arange(0, 128)
    f = tl.arange(0, 128)
    G = tl.full([128], float("-inf"), tl.float32)
    Z = tl.full([128], 0, tl.float32)
    N = tl.full([128, 128], 0, tl.float32)
    Q_at = Q + b.to(tl.int64) * Q_b + h.to(tl.int64) * Q_h
    Q_tile = tl.load(Q_at + p[:, None].to(tl.int64) * Q_p + e[None, :] * Q_e, mask=(p < P)[:, None], other=0)
    m_stop = tl.minimum(M, p_hi)
    m_full_stop = tl.maximum(0, (tl.minimum(tl.minimum(M, p_hi), p_lo + 1)) // 64 * 64)
    # full tiles need no masks
    for m_lo in range(0, m_full_stop, 64):
        G, Z, N = causal_step(
            G, Z, N, p, h, b, e, f, Q_tile, K, V, K_b, K_g, K_m, K_e, V_b, V_g, V_m, V_f, K_TMA, V_TMA, M, m_lo,
            MASKED=False
        )
    # tiles across the edge of the domain
    for m_lo in range(m_full_stop, m_stop, 64):
        G, Z, N = causal_step(
            G, Z, N, p, h, b, e, f, Q_tile, K, V, K_b, K_g, K_m, K_e, V_b, V_g, V_m, V_f, K_TMA, V_TMA, M, m_lo,
            MASKED=True
        )
    # O[b,h,p,f]: bf16 = N[b,h,p,(M - 1) // M0,f] / Z[b,h,p,(M - 1) // M0]   if Z[b,h,p,(M - 1) // M0] != 0
    keep = Z != 0
    O_at = O + b.to(tl.int64) * O_b + h.to(tl.int64) * O_h
    O_tile = tl.where(keep[:, None], N / Z[:, None], 0)
    tl.store(
        O_at + p[:, None].to(tl.int64) * O_p + f[None, :] * O_f,
        O_tile.to(O.dtype.element_ty), mask=(p < P)[:, None],
    )


def run(Q, K, V, *, B, M, P) -> tuple[torch.Tensor, ...]:
    O = torch.empty(B, 32, P, 128, dtype=torch.bfloat16, device=Q.device)
    K_read, K_TMA = described(K, (1, 1, 64, 128))
    V_read, V_TMA = described(V, (1, 1, 64, 128))
    grid = (-(-P // 128) * B * 32,)
    causal_kernel[grid](
        Q, K_read, V_read, O, *Q.stride(), *K.stride(), *V.stride(), M, P, K_TMA=K_TMA, V_TMA=V_TMA, num_warps=8,
        num_stages=3
    )
    return O,
