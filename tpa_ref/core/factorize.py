"""From K and V of each token to the factors that are cached, and back.

Eq. (3.1) of the paper: one token's matrix of heads by features is a sum of tensor products,

    K = (1/R) sum_r  a_r (x) b_r,        a_r in R^g,  b_r in R^d.

Four modes differ in what is cached per token and what is constant:

    mode         cached per token         constant               exact when
    contextual   a (R g) and b (R d)      nothing                R >= min(g, d)
    fixed-a      b (R d)                  A (R x g)              R = g
    fixed-b      a (g R)                  B (g x R x d)          R = d
    latent       c (R), for all heads     B (R x g x d)          R = g d

Always the *normed* K is factorized (Gemma norms K before RoPE). `contextual` and `fixed-a` cache b already rotated,
because RoPE commutes with A (Theorem 3.1); `fixed-b` and `latent` cache K before RoPE and rotate when they read.

Constant factors are the leading eigenvectors of second moments: of calibration text, or of the weights alone.
The error that every truncation returns is relative: ||X - X_R|| / ||X||, in the Frobenius norm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ..gemma.config import GemmaConfig

einsum = partial(np.einsum, optimize=True)


@dataclass(frozen=True)
class Factorization:
    """How one layer caches its K (or its V): `mode` is one of the four, or "dense".

    `fixed-b` and `latent` may bring factors made for the damage an error does instead of for the error itself
    (`spectral`): then coefficients come from `encoder` (otherwise the basis itself, whose rows are orthonormal), and
    `mean` is subtracted before and added behind, and so is what `predictor` makes of the words (`words`).
    dtype "spectral": coefficient s takes widths[s] bits. dtype "shared" (of V): its coefficients are those of K, where
    both are coded as one vector.
    """

    mode: str
    rank: int = 0
    dtype: str = "bfloat16"
    basis: Any = field(default=None, repr=False)  # A_sg, A_sgd, B_gsd or B_sgd (array or tensor); None: there is none
    error: float = 0.0  # share of the second moment that the constant basis leaves out, as a relative norm
    encoder: Any = field(default=None, repr=False)  # the shape of basis
    mean: Any = field(default=None, repr=False)  # [g,d]
    widths: tuple[int, ...] = field(default=(), repr=False)  # bits of each coefficient, for dtype "spectral"
    predictor: Any = field(default=None, repr=False)  # W_zgd

    @property
    def rotated(self) -> bool:
        """Is K cached after RoPE? Only where rotation and constant factors do not get in each other's way."""
        return self.mode in ("dense", "contextual", "fixed-a")

    def constants(self) -> dict[str, Any]:
        """Its constant arrays by name, None where there is none."""
        return {"basis": self.basis, "encoder": self.encoder, "mean": self.mean, "predictor": self.predictor}


def part_shapes(mode: str, rank: int, g: int, d: int) -> dict[str, tuple[int, ...]]:
    """What one token caches, as {part: shape}; the last axis is the one that is quantized in groups.

    The a's of `contextual` are few, so they form one row of R g numbers and share scales.

    >>> part_shapes("contextual", 2, g=4, d=256)
    {'A': (8,), 'B': (2, 256)}
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {
        "dense": {"X": (g, d)},
        "contextual": {"A": (rank * g,), "B": (rank, d)},
        "fixed-a": {"B": (rank, d)},
        "fixed-b": {"A": (g, rank)},
        "latent": {"C": (rank,)},
    }
    return shapes[mode]


# ---- contextual: the best factors of each token by itself ----


def exact_contextual(X_bkgd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eq. (3.1) with R = g and no error: one-hot a's pick the heads, so b_r is head r and a_r carries the R.

    Shapes: [b,k,g,d] -> A [b,k,g,g], B [b,k,g,d].
    """
    g = X_bkgd.shape[2]
    A_bksg = np.broadcast_to(g * np.eye(g, dtype=X_bkgd.dtype), (*X_bkgd.shape[:2], g, g))
    return A_bksg, X_bkgd


def truncate_contextual(X_bkgd: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The best rank-R factors of every token, by Eckart-Young: a_r = R u_r, b_r = u_r^T X, u_r the leading left
    singular vectors of X in R^{g x d}. They come from the small Gram matrix X X^T in R^{g x g}.

    The sign of u_r is free; its largest entry is made positive, so that every backend stores the same codes.
    The 1/R of Eq. (3.1) is undone in a.

    Shapes: [b,k,g,d], R -> A [b,k,R,g], B [b,k,R,d], relative error.

    >>> A, B, error = truncate_contextual(np.array([[[[3.0, 4.0], [0.0, 0.0]]]]), rank=1)
    >>> A.ravel().tolist(), B.ravel().tolist(), error
    ([1.0, 0.0], [3.0, 4.0], 0.0)
    """
    G_bkgj = einsum("bkgd,bkjd->bkgj", X_bkgd, X_bkgd)
    _, U_bkgs = np.linalg.eigh(G_bkgj)  # ascending eigenvalues
    U_bksg = np.swapaxes(U_bkgs[..., ::-1], -1, -2)[:, :, :rank]
    U_bksg = steady_signs(U_bksg).astype(X_bkgd.dtype)
    B_bksd = einsum("bksg,bkgd->bksd", U_bksg, X_bkgd)
    lost = max(0.0, 1 - float(np.square(B_bksd).sum()) / max(float(np.square(X_bkgd).sum()), 1e-30))
    return rank * U_bksg, B_bksd, lost**0.5


# ---- constant factors from second moments ----


def truncate_fixed_a(M_gdgd: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Constant A of `fixed-a`: leading eigenvectors of the heads' second moment E[X X^T] in R^{g x g}, rows times R.

    Shapes: M [g,d,g,d] = E[x x^T] of the flattened token -> A [R,g], relative error.
    """
    M_gj = einsum("gdjd->gj", M_gdgd)
    U_sg, error = _leading(M_gj, rank)
    return rank * U_sg, error


def truncate_fixed_a_pairs(M_gdgd: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Constant A of `fixed-a` for each RoPE frequency pair by itself: leading eigenvectors of E[z z^H] in C^{g x g},
    z the heads' pair as complex numbers. As many bytes per token as one A for all pairs, and never worse.

    Shapes: M [g,d,g,d] -> A [R,g,d] (see `mix_heads`), relative error.
    """
    g, d = M_gdgd.shape[:2]
    M_ggxy = M_gdgd.reshape(g, 2, d // 2, g, 2, d // 2)
    pair = np.arange(d // 2)
    M_pgjxy = M_ggxy[:, :, pair, :, :, pair].transpose(0, 1, 3, 2, 4)  # x, y: real or imaginary part
    Z_pgj = M_pgjxy[..., 0, 0] + M_pgjxy[..., 1, 1] + 1j * (M_pgjxy[..., 1, 0] - M_pgjxy[..., 0, 1])
    values_pg, U_pgs = np.linalg.eigh((Z_pgj + Z_pgj.conj().swapaxes(1, 2)) / 2)
    U_psg = U_pgs[..., ::-1].swapaxes(1, 2)[:, :rank]
    largest = np.take_along_axis(U_psg, np.abs(U_psg).argmax(-1, keepdims=True), -1)
    U_psg = U_psg * (np.abs(largest) / largest)  # a complex eigenvector has a free phase
    return rank * from_pairs(U_psg.transpose(1, 2, 0)), _relative_error(values_pg[:, g - rank :].sum(), values_pg.sum())


def exact_fixed_a(g: int) -> np.ndarray:
    """R = g: b_r is head r, the ordinary GQA cache written as TPA (MQA and GQA are special cases of Eq. 3.1)."""
    return g * np.eye(g)


def truncate_fixed_b(M_gdgd: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Constant B of `fixed-b`: per KV head the leading eigenvectors of E[x_g x_g^T] in R^{d x d}.

    Shapes: M [g,d,g,d] -> B [g,R,d] with orthonormal rows, relative error over all heads.
    """
    g = M_gdgd.shape[0]
    M_gdc = einsum("gdgc->gdc", M_gdgd)  # the diagonal blocks: each head with itself
    B_gsd = np.stack([_leading(M_gdc[head], rank)[0] for head in range(g)])
    kept = einsum("gsd,gdc,gsc->", B_gsd, M_gdc, B_gsd)
    return B_gsd, _relative_error(kept, einsum("gdd->", M_gdc))


def exact_fixed_b(g: int, d: int) -> np.ndarray:
    """R = d: the identity for every head."""
    return np.broadcast_to(np.eye(d), (g, d, d)).copy()


def truncate_latent(M_gdgd: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """Joint basis of `latent`: leading eigenvectors of E[x x^T] over all heads and features together, R^{gd x gd}.

    Shapes: M [g,d,g,d] -> B [R,g,d] with orthonormal rows (as vectors of length g d), relative error.
    """
    g, d = M_gdgd.shape[:2]
    U_sx, error = _leading(M_gdgd.reshape(g * d, g * d), rank)
    return U_sx.reshape(rank, g, d), error


def exact_latent(g: int, d: int) -> np.ndarray:
    """R = g d: the identity."""
    return np.eye(g * d).reshape(g * d, g, d)


def _leading(M: np.ndarray, rank: int) -> tuple[np.ndarray, float]:
    """(leading eigenvectors as rows, largest entry positive; relative error of leaving out the others)."""
    values, U = np.linalg.eigh((M + M.T).astype(np.float64) / 2)
    return steady_signs(U[:, ::-1][:, :rank].T), _relative_error(values[::-1][:rank].sum(), values.sum())


def steady_signs(U_sx: np.ndarray) -> np.ndarray:
    """Rows with their largest entry made positive: eigenvectors have no sign, but both backends choose one."""
    largest = np.take_along_axis(U_sx, np.abs(U_sx).argmax(-1, keepdims=True), -1)
    return U_sx * np.where(largest < 0, -1, 1)


def _relative_error(kept: float, total: float) -> float:
    return float(np.sqrt(max(0.0, 1 - kept / total))) if total > 0 else 0.0


def constant_basis(mode: str, rank: int, M_gdgd: np.ndarray) -> tuple[np.ndarray | None, float]:
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


def second_moment(X_bkgd: np.ndarray) -> np.ndarray:
    """Sum over tokens of x x^T for the flattened heads of each token: [b,k,g,d] -> [g,d,g,d]."""
    g, d = X_bkgd.shape[2:]
    X_tx = X_bkgd.reshape(-1, g * d).astype(np.float64)
    return (X_tx.T @ X_tx).reshape(g, d, g, d)


def moment_from_weights(W_gdm: np.ndarray, input_norm_m: np.ndarray, k_norm_d: np.ndarray | None = None) -> np.ndarray:
    """Second moment of K (or V) from the weights alone: the input after its norm is taken as white noise times 1 + w.

    For K give `k_norm_d`: every head is brought to rms 1 and multiplied with 1 + w_d, as QK-norm does on average.

    Shapes: W [g,d,m], input norm [m], k norm [d] or None -> [g,d,g,d].
    """
    W_gdm = W_gdm.astype(np.float64) * (1 + input_norm_m.astype(np.float64))
    if k_norm_d is not None:
        rms_g = np.sqrt(np.square(W_gdm).sum(-1).mean(-1))
        W_gdm = W_gdm / np.maximum(rms_g, 1e-30)[:, None, None] * (1 + k_norm_d.astype(np.float64))[:, None]
    return einsum("gdm,jcm->gdjc", W_gdm, W_gdm)


def truncate_query_heads(WQ_hdm: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Head-mixing rank of Q: W_Q = sum_r a_r (x) B_r with a_r in R^h (`fixed-a` on the query heads, by SVD of W_Q).

    Shapes: W_Q [h,d,m], R -> A [R,h], W [R,d,m] (W_Q = einsum("rh,rdm->hdm", A, W)), relative error.
    """
    h = WQ_hdm.shape[0]
    flat = WQ_hdm.reshape(h, -1).astype(np.float64)
    A_rh, error = _leading(flat @ flat.T, rank)
    W_rdm = (A_rh @ flat).reshape(rank, *WQ_hdm.shape[1:])
    return A_rh, W_rdm, error


# ---- one token's K or V -> what is cached, and back ----


def encode_pair(
    K_bkgd: np.ndarray, V_bkge: np.ndarray, how: tuple[Factorization, Factorization], Z_bkz: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The parts of K and of V that are cached. Coefficients that they share are the sum of what each gives to them,
    and lie with K. Z: the words of the tokens, [b,k,2m], where something is predicted from them.
    """
    how_k, how_v = how
    parts_k, parts_v = encode(K_bkgd, how_k, Z_bkz), encode(V_bkge, how_v, Z_bkz)
    if how_v.dtype == "shared":
        return {"C": parts_k["C"] + parts_v["C"]}, {}
    return parts_k, parts_v


def encode(X_bkgd: np.ndarray, how: Factorization, Z_bkz: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The parts that are cached: {part: [b, k, *part_shapes(...)]}.

    `contextual`: Eq. (3.1) solved per token. `fixed-a`: B = (1/R) A X (A has rows R u_r). `fixed-b`: a_g = B_g x_g.
    `latent`: c = B vec(X). In the last two the basis is orthonormal, so projecting is also the least-squares answer;
    with an encoder E of its own, c = E (x - mean - W z).
    """
    b, k = X_bkgd.shape[:2]
    if how.mode == "dense":
        return {"X": X_bkgd}
    if how.mode == "contextual":
        A_bksg, B_bksd, _ = truncate_contextual(X_bkgd, how.rank)
        return {"A": A_bksg.reshape(b, k, -1), "B": B_bksd}
    if how.mode == "fixed-a":
        return {"B": mix_heads_back(how.basis.astype(X_bkgd.dtype), X_bkgd) / how.rank}
    encoder = (how.basis if how.encoder is None else how.encoder).astype(X_bkgd.dtype)
    if how.mean is not None:
        X_bkgd = X_bkgd - how.mean.astype(X_bkgd.dtype)
    if how.predictor is not None:
        X_bkgd = X_bkgd - predicted(Z_bkz, how)
    if how.mode == "fixed-b":
        return {"A": einsum("gsd,bkgd->bkgs", encoder, X_bkgd)}
    return {"C": einsum("sgd,bkgd->bks", encoder, X_bkgd)}


def decode(parts: dict[str, np.ndarray], how: Factorization, g: int) -> np.ndarray:
    """K or V formed again from its parts, Eq. (3.1): [b,k,g,d]. The oracle of the factorized attention, and how
    `fixed-b` and `latent` rebuild K before they rotate it. A part "Z" are the words, which nobody stores.
    """
    if how.mode == "dense":
        return parts["X"]
    if how.mode == "contextual":
        A_bksg = parts["A"].reshape(*parts["A"].shape[:2], how.rank, g)
        return einsum("bksg,bksd->bkgd", A_bksg, parts["B"]) / how.rank
    basis = how.basis.astype(next(iter(parts.values())).dtype)
    if how.mode == "fixed-a":
        return mix_heads(basis, parts["B"]) / how.rank
    if how.mode == "fixed-b":
        X_bkgd = einsum("bkgs,gsd->bkgd", parts["A"], basis)
    else:
        X_bkgd = einsum("bks,sgd->bkgd", parts["C"], basis)
    if how.predictor is not None:
        X_bkgd = X_bkgd + predicted(parts["Z"], how)
    return X_bkgd if how.mean is None else X_bkgd + how.mean.astype(basis.dtype)


def predicted(Z_bkz: np.ndarray | None, how: Factorization) -> np.ndarray:
    """What the words tell of K or V, W z: [b,k,z] -> [b,k,g,d]."""
    assert Z_bkz is not None
    return einsum("bkz,zgd->bkgd", Z_bkz, how.predictor.astype(Z_bkz.dtype))


def mix_heads(A: np.ndarray, B_bksd: np.ndarray) -> np.ndarray:
    """sum_s a_s (x) b_s with a constant A: [s,g], or [s,g,d], one complex number for every pair of features that RoPE
    rotates (real part at i, imaginary part at i + d/2). Such an A turns a pair like RoPE does, so the two commute.

    Shapes: A, B [b,k,s,d] -> [b,k,g,d].

    >>> mix_heads(np.array([[[0.0, 1.0]]]), np.array([[[[1.0, 0.0]]]])).tolist()  # times i: a quarter turn
    [[[[0.0, 1.0]]]]
    """
    if A.ndim == 2:
        return einsum("sg,bksd->bkgd", A, B_bksd)
    return from_pairs(einsum("sgp,bksp->bkgp", as_pairs(A), as_pairs(B_bksd)))


def mix_heads_back(A: np.ndarray, X_bkgd: np.ndarray) -> np.ndarray:
    """The adjoint of `mix_heads`: b_s = sum_g conj(a_sg) x_g. With it <x, A b> = <mix_heads_back(A, x), b>."""
    if A.ndim == 2:
        return einsum("sg,bkgd->bksd", A, X_bkgd)
    return from_pairs(einsum("sgp,bkgp->bksp", as_pairs(A).conj(), as_pairs(X_bkgd)))


def as_pairs(x: np.ndarray) -> np.ndarray:
    """Features i and i + d/2, which RoPE rotates together, as one complex number: [..., d] -> [..., d/2]."""
    real, imaginary = np.split(x, 2, -1)
    return real + 1j * imaginary


def from_pairs(z: np.ndarray) -> np.ndarray:
    """The inverse of `as_pairs`."""
    return np.concatenate([z.real, z.imag], -1)


def numbers_per_token(mode: str, rank: int, config: GemmaConfig) -> int:
    """How many numbers one token caches for K (or for V) in one layer.

    >>> [numbers_per_token(mode, 1, GemmaConfig.gemma3_1b()) for mode in ("contextual", "dense")]
    [257, 256]
    """
    shapes = part_shapes(mode, rank, config.num_kv_heads, config.head_dim)
    return sum(int(np.prod(shape)) for shape in shapes.values())
