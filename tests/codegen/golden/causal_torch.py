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


def run(Q, K, V, *, B, M, P) -> tuple[torch.Tensor, ...]:
    Q = Q.unflatten(1, (8, 4))
    O = torch.empty(B, 8, 4, P, 128, dtype=torch.bfloat16, device=Q.device)
    for p_lo in range(0, P, 128):
        p_hi = min(p_lo + 128, P)
        G = torch.full((B, 8, 4, p_hi - p_lo), -torch.inf, dtype=torch.float32, device=Q.device)
        Z = torch.full((B, 8, 4, p_hi - p_lo), 0, dtype=torch.float32, device=Q.device)
        N = torch.full((B, 8, 4, p_hi - p_lo, 128), 0, dtype=torch.float32, device=Q.device)
        Q_tile = Q[:, :, :, p_lo:p_hi].float().flatten(2, 3)
        p_ = torch.arange(p_lo, p_hi, device=Q.device)
        m_end = min(M, p_hi)
        for m_lo in range(0, m_end, 64):
            m_hi = min(m_lo + 64, m_end)
            partial = not (p_lo + 1 >= m_hi)
            # S[b,hg,hr,p,m1,m0] = sum(e) 0.088388347648318 * K[b,hg,m1*M0 + m0,e] * Q[b,hg,hr,p,e]   if m0 + m1*M0 <
            #   M & m0 + m1*M0 <= p
            S = torch.matmul(Q_tile, K[:, :, m_lo:m_hi].float().mT).unflatten(2, (4, p_hi - p_lo)).mul_(0.088388347648318)
            if partial:
                m_ = torch.arange(m_lo, m_hi, device=Q.device)
                keep = m_ <= p_[:, None]
                S.masked_fill_(~keep, -torch.inf)
            # GL[b,hg,hr,p,m1] = max(m0) S[b,hg,hr,p,m1,m0]
            GL = S.amax(-1)
            # G[b,hg,hr,p,m1] = Max(GL[b,hg,hr,p,m1], G[b,hg,hr,p,m1 - 1])   along m1 from -oo
            G_new = torch.maximum(GL, G)
            G_ref = G_new.masked_fill(G_new.isinf(), 0)
            # W[b,hg,hr,p,m1,m0] = exp(S[b,hg,hr,p,m1,m0] - G[b,hg,hr,p,m1])
            W = S.sub_(G_ref[..., None]).mul_(1.4426950408889634).exp2_()
            # ZL[b,hg,hr,p,m1] = sum(m0) W[b,hg,hr,p,m1,m0]
            ZL = W.sum(-1)
            C = (G - G_ref).mul_(1.4426950408889634).exp2_()
            # Z[b,hg,hr,p,m1] = Z[b,hg,hr,p,m1 - 1] * exp(G[b,hg,hr,p,m1 - 1] - G[b,hg,hr,p,m1]) + ZL[b,hg,hr,p,m1]
            #   along m1 from 0
            Z = Z.mul_(C).add_(ZL)
            # NL[b,hg,hr,p,m1,f] = sum(m0) V[b,hg,m1*M0 + m0,f] * W[b,hg,hr,p,m1,m0]
            NL = torch.matmul(W.flatten(2, 3), V[:, :, m_lo:m_hi].float()).unflatten(2, (4, p_hi - p_lo))
            # N[b,hg,hr,p,m1,f] = N[b,hg,hr,p,m1 - 1,f] * exp(G[b,hg,hr,p,m1 - 1] - G[b,hg,hr,p,m1]) +
            #   NL[b,hg,hr,p,m1,f]   along m1 from 0
            N = N.mul_(C[..., None]).add_(NL)
            G = G_new
        # O[b,hg,hr,p,f]: bf16 = N[b,hg,hr,p,(M - 1) // M0,f] / Z[b,hg,hr,p,(M - 1) // M0]   if Z[b,hg,hr,p,(M - 1) //
        #   M0] != 0
        O[:, :, :, p_lo:p_hi, :] = torch.where((Z != 0)[..., None], N.div_(Z[..., None]), 0)
    return O.flatten(1, 2),
