"""START HERE: Tensor Product Attention (TPA, arXiv 2501.06425) in one file, nothing but arrays.

Attention caches two matrices for every token: its keys K, g heads by d features, and its values V. TPA caches factors
instead: R vectors a_r over the heads and R vectors b_r over the features, whose products add up to K. Attention is
computed from the factors, so K and V are never formed. The paper trains a model that emits factors. This project
converts a trained Gemma 3, so here they are the best factors of the K and V that Gemma computes.

One letter per axis, and every array carries its axes as a suffix:

    b  batch             h  query heads, h = g n       s, u  rank R of K, of V
    q  query position    g  KV heads                   d, e  features of a key, of a value
    k  key position      n  query heads per KV head

Read from top to bottom, one equation per function. `python -m tpa_ref.tpa` shows each one at work.
"""

import numpy as np
from numpy import ndarray as Array

ALL = np.ones((1, 1, 1), bool)  # seen_bqk of queries that see every key


def tensor_product(A_bksg: Array, B_bksd: Array) -> Array:
    """Eq. (3.1): one token's K = 1/R sum_r a_r (x) b_r = 1/R A^T B. Shapes: [b,k,s,g], [b,k,s,d] -> [b,k,g,d]."""
    return np.einsum("bksg,bksd->bkgd", A_bksg, B_bksd) / A_bksg.shape[2]


def factor(K_bkgd: Array, rank: int) -> tuple[Array, Array]:
    """Eq. (3.1) solved for A and B: the closest sum of R products, from the SVD of each token's K. Exact at R = g.

    The error is the discarded singular values (Eckart-Young). Shapes: [b,k,g,d] -> A [b,k,s,g], B [b,k,s,d].

    >>> tensor_product(*factor(np.array([[[[3.0, 4.0], [6.0, 8.0]]]]), rank=1)).round(9).tolist()
    [[[[3.0, 4.0], [6.0, 8.0]]]]
    """
    U_bkgs, sigma_bks, V_bksd = np.linalg.svd(K_bkgd, full_matrices=False)
    s = min(rank, sigma_bks.shape[2])
    A_bksg = s * U_bkgs[..., :s].swapaxes(2, 3)  # times R, because Eq. (3.1) divides by it
    return A_bksg, sigma_bks[:, :, :s, None] * V_bksd[:, :, :s]


def rope(B_bksd: Array, positions_bk: Array, base: float = 10_000.0) -> Array:
    """Eq. (3.5): rotate each pair of features (i, i + d/2) by the angle position * base^(-2i/d). Shape unchanged.

    Theorem 3.1: RoPE(A^T B) = A^T RoPE(B), because RoPE mixes features and A mixes heads. So b is rotated once, before
    it is cached, and a never. Queries [b,q,h,d] are rotated by the same function.

    >>> rope(np.array([[[[1.0, 0.0]]]]), positions_bk=np.array([[1]])).round(4).tolist()  # cos 1, sin 1
    [[[[0.5403, 0.8415]]]]
    """
    half = B_bksd.shape[3] // 2
    angle_bk1i = positions_bk[:, :, None, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle_bk1i), np.sin(angle_bk1i)
    first, second = np.split(B_bksd, 2, axis=3)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=3)


def scores(Q_bqhd: Array, A_bksg: Array, B_bksd: Array) -> Array:
    """Eq. (A.2), logits without K: 1/(R sqrt d) sum_s a_s[h] (q . b_s). Q and B are rotated. -> [b,h,q,k].

    That is R dot products instead of one, but far fewer numbers to read, and reading is what takes the time.
    """
    (s, d), n = B_bksd.shape[2:], Q_bqhd.shape[2] // A_bksg.shape[3]
    P_bqhks = np.einsum("bqhd,bksd->bqhks", Q_bqhd, B_bksd)
    A_bksh = np.repeat(A_bksg, n, axis=3)  # query head h belongs to KV head h // n
    return np.einsum("bksh,bqhks->bhqk", A_bksh, P_bqhks) / (s * d**0.5)


def visible(positions_bq: Array, positions_bk: Array, window: float = np.inf) -> Array:
    """Query i sees key j if 0 <= i - j < w: itself and the w - 1 keys before it. Shapes: [b,q], [b,k] -> [b,q,k]."""
    distance_bqk = positions_bq[:, :, None] - positions_bk[:, None, :]
    return (distance_bqk >= 0) & (distance_bqk < window)


def softmax(L_bhqk: Array, seen_bqk: Array = ALL) -> Array:
    """exp(L) / sum exp(L), over the keys that each query sees. Shapes: [b,h,q,k], [b,q,k] -> [b,h,q,k]."""
    L_bhqk = np.where(seen_bqk[:, None], L_bhqk, -np.inf)
    exp_bhqk = np.exp(L_bhqk - L_bhqk.max(3, keepdims=True))  # the maximum cancels; without it exp overflows
    return exp_bhqk / exp_bhqk.sum(3, keepdims=True)


def values(P_bhqk: Array, A_bkug: Array, B_bkue: Array) -> Array:
    """Eq. (A.3), the output without V: 1/R sum_u sum_k (p a_u[h]) b_u, where p a is one number. -> [b,q,h,e]."""
    A_bkuh = np.repeat(A_bkug, P_bhqk.shape[1] // A_bkug.shape[3], axis=3)
    W_bhqku = np.einsum("bhqk,bkuh->bhqku", P_bhqk, A_bkuh)
    return np.einsum("bhqku,bkue->bqhe", W_bhqku, B_bkue) / B_bkue.shape[2]


def attention(
    Q_bqhd: Array, AK_bksg: Array, BK_bksd: Array, AV_bkug: Array, BV_bkue: Array, seen: Array = ALL
) -> Array:
    """Algorithm 1: attention from factors, Q and B_K rotated. -> [b,q,h,e].

    In the paper queries are factors too, so its q . b is b . b, one number for all heads, and A_Q joins A_K in the sum.
    Gemma's queries are dense, and as they are not cached, factors of them would save no memory.
    """
    return values(softmax(scores(Q_bqhd, AK_bksg, BK_bksd), seen), AV_bkug, BV_bkue)


class Cache:
    """The factors that tokens leave behind in one layer, A_K, B_K, A_V, B_V. Token p lies in slot p mod slots.

    A global layer has a slot for every token. A window layer has only w, a ring: token p replaces token p - w, which
    no later query sees. So whatever is stored is visible, and the newest query needs no mask. The order of slots does
    not matter: attention sums over keys, and where a key stood is in its rotation.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.length = slots, 0
        self.factors: list[Array] = []

    def append(self, *token: Array) -> None:
        """Store the factors of one token, [b,1,...] each; the first token allocates all slots."""
        if not self.factors:
            self.factors = [np.zeros((x.shape[0], self.slots, *x.shape[2:]), x.dtype) for x in token]
        for stored, new in zip(self.factors, token):
            stored[:, self.length % self.slots] = new[:, 0]
        self.length += 1

    def read(self) -> list[Array]:
        """The filled slots of each factor, [b,k,...]."""
        return [stored[:, : self.length] for stored in self.factors]

    def positions(self) -> list[int]:
        """Which token each filled slot holds: the newest p with p mod slots = slot."""
        return [range(slot, self.length, self.slots)[-1] for slot in range(min(self.slots, self.length))]


def numbers_per_token(g: int, d: int, rank: int | None = None) -> int:
    """What one token's K takes, and its V again: g d numbers as a matrix, R (g + d) as factors."""
    return g * d if rank is None else rank * (g + d)


def show(equation: str, statement: str, ours: Array, expected: Array) -> None:
    """Print one statement with the largest error, relative to the largest number."""
    print(f"{equation:9}{statement:79}{np.abs(ours - expected).max() / np.abs(expected).max():8.0e}")


def main() -> None:
    """Both sides of every equation on random arrays, and how far apart they are."""
    t, g, n, d, R, w = 8, 4, 2, 16, 2, 4
    rng = np.random.default_rng(0)
    Q_bqhd, K_bkgd, V_bkge = (rng.standard_normal((1, t, heads, d)) for heads in (g * n, g, g))
    at_bk = np.arange(t)[None]  # positions
    print(f"{t} random tokens, {g * n} query heads on g = {g} KV heads, d = {d} features.{'error':>42}\n")
    show("Eq. 3.1", f"K = 1/R sum a_r (x) b_r is exact at R = g = {g}", tensor_product(*factor(K_bkgd, g)), K_bkgd)

    (AK_bksg, BK_bksd), (AV_bkug, BV_bkue) = factor(K_bkgd, R), factor(V_bkge, R)
    KR_bkgd, VR_bkge = tensor_product(AK_bksg, BK_bksd), tensor_product(AV_bkug, BV_bkue)
    off, lost = np.linalg.norm(K_bkgd - KR_bkgd), np.linalg.norm(np.linalg.svd(K_bkgd, compute_uv=False)[..., R:])
    show("", f"R = {R}: K is {off / np.linalg.norm(K_bkgd):.0%} off, exactly the discarded singular values", off, lost)
    Q_bqhd, KR_bkgd, BK_bksd = (rope(x_bksd, at_bk) for x_bksd in (Q_bqhd, KR_bkgd, BK_bksd))
    show("Eq. 3.5", "RoPE(A^T B) = A^T RoPE(B): rotating b rotates K", tensor_product(AK_bksg, BK_bksd), KR_bkgd)

    # From here on K_R and V_R are formed only to have something to compare with: ordinary dense attention.
    KR_bkhd, VR_bkhe = np.repeat(KR_bkgd, n, axis=2), np.repeat(VR_bkge, n, axis=2)
    L_bhqk = np.einsum("bqhd,bkhd->bhqk", Q_bqhd, KR_bkhd) / d**0.5
    P_bhqk, windowP_bhqk = softmax(L_bhqk, visible(at_bk, at_bk)), softmax(L_bhqk, visible(at_bk, at_bk, w))
    O_bqhe, windowO_bqhe = (np.einsum("bhqk,bkhe->bqhe", P, VR_bkhe) for P in (P_bhqk, windowP_bhqk))
    show("Eq. A.2", "logits from q, a and b equal q . k", scores(Q_bqhd, AK_bksg, BK_bksd), L_bhqk)
    show("Eq. A.3", "outputs from p, a and b equal sum p v", values(P_bhqk, AV_bkug, BV_bkue), O_bqhe)
    factors = AK_bksg, BK_bksd, AV_bkug, BV_bkue
    show(
        "Alg. 1", f"attention with a window of {w}", attention(Q_bqhd, *factors, visible(at_bk, at_bk, w)), windowO_bqhe
    )

    print("\nGeneration, one token at a time. Which token each slot holds, in a global and in a window layer:")
    layers = [(Cache(t), O_bqhe), (Cache(w), windowO_bqhe)]
    for i in range(t):
        for cache, _ in layers:
            cache.append(*(x[:, i : i + 1] for x in factors))
        ours = np.stack([attention(Q_bqhd[:, i : i + 1], *cache.read()) for cache, _ in layers])
        held = "   ".join(f"{cache.positions()!s:26}" for cache, _ in layers)
        show(f"token {i}", held, ours, np.stack([O[:, i : i + 1] for _, O in layers]))

    print(f"\nBytes per token and layer, K and V in bfloat16{'dense':>15}{'R = 1':>9}{'R = 2':>9}{'R = g':>9}")
    for size, heads, features in ("1B", 1, 256), ("4B", 4, 256), ("12B", 8, 256), ("27B", 16, 128):
        counts = (numbers_per_token(heads, features, rank and min(rank, heads)) for rank in (None, 1, 2, heads))
        print(f"  Gemma 3 {size:5} g = {heads:2}, d = {features}", *(f"{2 * 2 * count:8,}" for count in counts))
    print("Factors share b among heads. A 1B has one KV head: 257 numbers instead of 256. Elsewhere R = g is exact ...")


if __name__ == "__main__":
    main()
