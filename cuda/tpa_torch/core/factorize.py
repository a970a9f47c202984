"""From K and V of each token to the factors that are cached, and back. Twin of `tpa_ref.factorize`."""

from __future__ import annotations

import torch
from torch import Tensor

from tpa_ref.core.factorize import Factorization, numbers_per_token, part_shapes

__all__ = ["Factorization", "numbers_per_token", "part_shapes"]


# ---- contextual: the best factors of each token by itself ----


def exact_contextual(X_bkgd: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (3.1) with R = g and no error: one-hot a's pick the heads. [b,k,g,d] -> A [b,k,g,g], B [b,k,g,d]."""
    g = X_bkgd.shape[2]
    A_bksg = (g * torch.eye(g, dtype=X_bkgd.dtype, device=X_bkgd.device)).expand(*X_bkgd.shape[:2], g, g)
    return A_bksg, X_bkgd


def truncate_contextual(X_bkgd: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best rank-R factors of every token: a_r = R u_r, b_r = u_r^T X with the leading left singular vectors u_r.

    Shapes: [b,k,g,d], R -> A [b,k,R,g], B [b,k,R,d], relative error.
    """
    A_bksg, B_bksd = contextual_factors(X_bkgd, rank)
    lost = 1 - float(B_bksd.double().square().sum()) / max(float(X_bkgd.double().square().sum()), 1e-30)
    return A_bksg, B_bksd, max(0.0, lost) ** 0.5


def contextual_factors(X_bkgd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of `truncate_contextual` without its error, which would make a GPU wait."""
    X32 = X_bkgd if X_bkgd.dtype == torch.float64 else X_bkgd.float()
    if X32.shape[2] == 1:  # one KV head: K itself is b
        return torch.ones_like(X_bkgd[..., :1]), X_bkgd
    _, U_bkgs = torch.linalg.eigh(X32 @ X32.mT)  # ascending eigenvalues
    U_bksg = steady_signs(U_bkgs.flip(-1).mT[:, :, :rank])
    return (rank * U_bksg).to(X_bkgd.dtype), (U_bksg @ X32).to(X_bkgd.dtype)


# ---- constant factors from second moments ----


def truncate_fixed_a(M_gdgd: Tensor, rank: int) -> tuple[Tensor, float]:
    """Constant A of `fixed-a`: leading eigenvectors of the heads' second moment, rows times R. -> A [R,g], error."""
    U_sg, error = _leading(torch.einsum("gdjd->gj", M_gdgd), rank)
    return rank * U_sg, error


def truncate_fixed_a_pairs(M_gdgd: Tensor, rank: int) -> tuple[Tensor, float]:
    """Constant A of `fixed-a` for each RoPE frequency pair by itself. -> A [R,g,d] (see `mix_heads`), error."""
    g, d = M_gdgd.shape[:2]
    M_pgjxy = M_gdgd.double().reshape(g, 2, d // 2, g, 2, d // 2).diagonal(0, 2, 5).permute(4, 0, 2, 1, 3)
    real, imaginary = M_pgjxy[..., 0, 0] + M_pgjxy[..., 1, 1], M_pgjxy[..., 1, 0] - M_pgjxy[..., 0, 1]
    Z_pgj = torch.complex(real, imaginary)
    values_pg, U_pgs = torch.linalg.eigh((Z_pgj + Z_pgj.mH) / 2)
    U_psg = U_pgs.flip(-1).mT[:, :rank]
    largest = U_psg.gather(-1, U_psg.abs().argmax(-1, keepdim=True))
    U_psg = U_psg * (largest.abs() / largest)  # a complex eigenvector has a free phase
    A_sgd = torch.cat([U_psg.real, U_psg.imag], 0).unflatten(0, (2, -1)).permute(2, 3, 0, 1).flatten(-2)
    return rank * A_sgd, _relative_error(float(values_pg[:, g - rank :].sum()), float(values_pg.sum()))


def exact_fixed_a(g: int) -> Tensor:
    """R = g: b_r is head r, the ordinary GQA cache written as TPA."""
    return g * torch.eye(g, dtype=torch.float64)


def truncate_fixed_b(M_gdgd: Tensor, rank: int) -> tuple[Tensor, float]:
    """Constant B of `fixed-b`: per KV head the leading eigenvectors of its second moment. -> B [g,R,d], error."""
    M_gdc = torch.einsum("gdgc->gdc", M_gdgd)
    B_gsd = torch.stack([_leading(M_dc, rank)[0] for M_dc in M_gdc])
    kept = torch.einsum("gsd,gdc,gsc->", B_gsd, M_gdc.to(B_gsd.dtype), B_gsd)
    return B_gsd, _relative_error(float(kept), float(torch.einsum("gdd->", M_gdc)))


def exact_fixed_b(g: int, d: int) -> Tensor:
    """R = d: the identity for every head."""
    return torch.eye(d, dtype=torch.float64).repeat(g, 1, 1)


def truncate_latent(M_gdgd: Tensor, rank: int) -> tuple[Tensor, float]:
    """Joint basis of `latent`: leading eigenvectors over all heads and features together. -> B [R,g,d], error."""
    g, d = M_gdgd.shape[:2]
    U_sx, error = _leading(M_gdgd.reshape(g * d, g * d), rank)
    return U_sx.reshape(rank, g, d), error


def exact_latent(g: int, d: int) -> Tensor:
    """R = g d: the identity."""
    return torch.eye(g * d, dtype=torch.float64).reshape(g * d, g, d)


def _leading(M: Tensor, rank: int) -> tuple[Tensor, float]:
    """(leading eigenvectors as rows, largest entry positive; relative error of leaving out the others)."""
    values, U = torch.linalg.eigh((M + M.mT).double() / 2)
    kept = float(values.flip(0)[:rank].sum())
    return steady_signs(U.flip(-1)[:, :rank].mT), _relative_error(kept, float(values.sum()))


def steady_signs(U_sx: Tensor) -> Tensor:
    """Rows with their largest entry made positive: eigenvectors have no sign, but both backends choose one."""
    largest = U_sx.gather(-1, U_sx.abs().argmax(-1, keepdim=True))
    return torch.where(largest < 0, -U_sx, U_sx)


def _relative_error(kept: float, total: float) -> float:
    return max(0.0, 1 - kept / total) ** 0.5 if total > 0 else 0.0


def constant_basis(mode: str, rank: int, M_gdgd: Tensor) -> tuple[Tensor | None, float]:
    """(constant factor of a mode, relative error); None for `contextual`, which has none."""
    g, d = M_gdgd.shape[:2]
    if mode == "contextual":
        return None, 0.0
    if mode == "fixed-a" and rank == g:
        return exact_fixed_a(g), 0.0
    if mode == "fixed-b" and rank == d:
        return exact_fixed_b(g, d), 0.0
    if mode == "latent" and rank == g * d:
        return exact_latent(g, d), 0.0
    truncate = {"fixed-a": truncate_fixed_a_pairs, "fixed-b": truncate_fixed_b, "latent": truncate_latent}[mode]
    return truncate(M_gdgd, rank)


def second_moment(X_bkgd: Tensor) -> Tensor:
    """Sum over tokens of x x^T for the flattened heads of each token: [b,k,g,d] -> [g,d,g,d], at least float32."""
    g, d = X_bkgd.shape[2:]
    X_tx = X_bkgd.reshape(-1, g * d)
    X_tx = X_tx if X_tx.dtype.itemsize == 8 else X_tx.float()
    return (X_tx.mT @ X_tx).reshape(g, d, g, d)


def moment_from_weights(W_gdm: Tensor, input_norm_m: Tensor, k_norm_d: Tensor | None = None) -> Tensor:
    """Second moment of K (or V) from the weights alone: the normed input is taken as white noise times 1 + w."""
    W_gdm = W_gdm.double() * (1 + input_norm_m.double())
    if k_norm_d is not None:
        rms_g = W_gdm.square().sum(-1).mean(-1).sqrt()
        W_gdm = W_gdm / rms_g.clamp(min=1e-30)[:, None, None] * (1 + k_norm_d.double())[:, None]
    return torch.einsum("gdm,jcm->gdjc", W_gdm, W_gdm)


def truncate_query_heads(WQ_hdm: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Head-mixing rank of Q: W_Q = sum_r a_r (x) B_r. [h,d,m] -> A [R,h], W [R,d,m], relative error."""
    flat = WQ_hdm.flatten(1).double()
    A_rh, error = _leading(flat @ flat.mT, rank)
    return A_rh, (A_rh @ flat).unflatten(1, WQ_hdm.shape[1:]), error


# ---- one token's K or V -> what is cached, and back ----


def encode_pair(
    K_bkgd: Tensor, V_bkge: Tensor, how: tuple[Factorization, Factorization], Z_bkz: Tensor | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The parts of K and of V that are cached; coefficients that they share lie with K. Z: the words, [b,k,2m]."""
    how_k, how_v = how
    parts_k, parts_v = encode(K_bkgd, how_k, Z_bkz), encode(V_bkge, how_v, Z_bkz)
    if how_v.dtype == "shared":
        return {"C": parts_k["C"] + parts_v["C"]}, {}
    return parts_k, parts_v


def encode(X_bkgd: Tensor, how: Factorization, Z_bkz: Tensor | None = None) -> dict[str, Tensor]:
    """The parts that are cached: {part: [b, k, *part_shapes(...)]}."""
    if how.mode == "dense":
        return {"X": X_bkgd}
    if how.mode == "contextual":
        A_bksg, B_bksd = contextual_factors(X_bkgd, how.rank)
        return {"A": A_bksg.flatten(2), "B": B_bksd}
    if how.mode == "fixed-a":
        return {"B": mix_heads_back(how.basis.to(X_bkgd.dtype), X_bkgd) / how.rank}
    encoder = (how.basis if how.encoder is None else how.encoder).to(X_bkgd.dtype)
    if how.mean is not None:
        X_bkgd = X_bkgd - how.mean.to(X_bkgd.dtype)
    if how.predictor is not None:
        X_bkgd = X_bkgd - predicted(Z_bkz, how).to(X_bkgd.dtype)
    if how.mode == "fixed-b":
        return {"A": torch.einsum("gsd,bkgd->bkgs", encoder, X_bkgd)}
    return {"C": X_bkgd.flatten(2) @ encoder.flatten(1).mT}


def decode(parts: dict[str, Tensor], how: Factorization, g: int) -> Tensor:
    """K or V formed again from its parts, Eq. (3.1): [b,k,g,d]."""
    if how.mode == "dense":
        return parts["X"]
    if how.mode == "contextual":
        A_bksg = parts["A"].unflatten(-1, (how.rank, g))
        return torch.einsum("bksg,bksd->bkgd", A_bksg, parts["B"]) / how.rank
    part = next(iter(parts.values()))
    basis = how.basis.to(part.dtype)
    if how.mode == "fixed-a":
        return mix_heads(basis, parts["B"]) / how.rank
    if how.mode == "fixed-b":
        X_bkgd = torch.einsum("bkgs,gsd->bkgd", parts["A"], basis)
    else:
        X_bkgd = (parts["C"] @ basis.flatten(1)).unflatten(-1, basis.shape[1:])
    if how.predictor is not None:
        X_bkgd = X_bkgd + predicted(parts["Z"], how).to(basis.dtype)
    return X_bkgd if how.mean is None else X_bkgd + how.mean.to(basis.dtype)


def predicted(Z_bkz: Tensor | None, how: Factorization) -> Tensor:
    """What the words tell of K or V, W z: [b,k,z] -> [b,k,g,d]."""
    assert Z_bkz is not None
    return (Z_bkz @ how.predictor.to(Z_bkz.dtype).flatten(1)).unflatten(-1, how.predictor.shape[1:])


def mix_heads(A: Tensor, B_bksd: Tensor) -> Tensor:
    """sum_s a_s (x) b_s with a constant A, [s,g] or, complex for every RoPE pair, [s,g,d]. B [b,k,s,d] -> [b,k,g,d]."""
    if A.ndim == 2:
        return torch.einsum("sg,bksd->bkgd", A, B_bksd)
    real, imaginary = A.movedim(0, 1).chunk(2, -1)  # [g,s,d/2] against [b,k,1,s,d/2]
    return multiply_pairs(real, imaginary, B_bksd[:, :, None]).sum(-2)


def mix_heads_back(A: Tensor, X_bkgd: Tensor) -> Tensor:
    """The adjoint of `mix_heads`: b_s = sum_g conj(a_sg) x_g."""
    if A.ndim == 2:
        return torch.einsum("sg,bkgd->bksd", A, X_bkgd)
    real, imaginary = A.chunk(2, -1)  # [s,g,d/2] against [b,k,1,g,d/2]
    return multiply_pairs(real, -imaginary, X_bkgd[:, :, None]).sum(-2)


def multiply_pairs(real: Tensor, imaginary: Tensor, x: Tensor) -> Tensor:
    """(real + i imaginary) times the pairs (i, i + d/2) of x as complex numbers: [..., d]."""
    first, second = x.chunk(2, -1)
    return torch.cat([real * first - imaginary * second, real * second + imaginary * first], -1)
