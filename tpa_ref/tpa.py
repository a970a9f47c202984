"""START HERE: Tensor Product Attention (TPA, arXiv 2501.06425) in one file, with nothing but arrays.

Attention caches a token's keys K, a matrix of g heads by d features, and its values V. TPA caches factors instead: R
vectors a_r over the heads and R vectors b_r over the features, whose outer products a_r (x) b_r add up to K. Attention
reads the factors and never forms K or V. The paper trains a model to emit factors; this project converts a trained
Gemma 3, so here they are the best factors of what Gemma computes: K after its norm and before RoPE, and V.

Read from top to bottom, one equation per function; `python -m tpa_ref.tpa` shows each of them at work. One letter per
axis, and every array carries its axes as a suffix:

    b  batch             h  query heads, h = g n       s, u  r = 1 ... R of K, of V
    q  query position    g  KV heads                   d, e  features of a key, of a value
    k  key position      n  query heads per KV head
"""

import numpy as np
from numpy import ndarray as Array


def tensor_product(A_bksg: Array, B_bksd: Array) -> Array:
    """Eq. (3.1): a token's K = 1/R sum_r a_r (x) b_r = 1/R A^T B. Shapes: [b,k,s,g], [b,k,s,d] -> [b,k,g,d].

    >>> tensor_product(np.array([[[[1.0, 2.0]]]]), np.array([[[[3.0, 4.0, 5.0]]]])).tolist()  # R = 1: heads share b
    [[[[3.0, 4.0, 5.0], [6.0, 8.0, 10.0]]]]
    """
    return np.einsum("bksg,bksd->bkgd", A_bksg, B_bksd) / A_bksg.shape[2]


def factor(K_bkgd: Array, rank: int) -> tuple[Array, Array]:
    """Eq. (3.1) solved for A and B: the closest sum of R products, from the SVD of each token's K. Exact at R = g;
    below, the error is the discarded singular values (Eckart-Young). Shapes: [b,k,g,d] -> [b,k,s,g], [b,k,s,d].
    """
    left_bkgs, sigma_bks, right_bksd = np.linalg.svd(K_bkgd, full_matrices=False)
    s = min(rank, sigma_bks.shape[2])
    return s * left_bkgs[..., :s].swapaxes(2, 3), sigma_bks[:, :, :s, None] * right_bksd[:, :, :s]  # s undoes the 1/R


def rope(B_bksd: Array, positions_bk: Array, base: float = 10_000.0) -> Array:
    """Eq. (3.5): rotate each pair of features (i, i + d/2) by the angle position * base^(-2i/d). Shape unchanged.

    Theorem 3.1: RoPE(A^T B) = A^T RoPE(B), because RoPE mixes features and A mixes heads. So b is rotated once, before
    it is cached, and a never. Queries go through the same function.
    """
    half = B_bksd.shape[3] // 2
    angle_bk1i = positions_bk[:, :, None, None] * base ** (-np.arange(half) / half)
    cos, sin = np.cos(angle_bk1i), np.sin(angle_bk1i)
    first, second = np.split(B_bksd, 2, axis=3)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=3)


def scores(Q_bqhd: Array, A_bksg: Array, B_bksd: Array) -> Array:
    """Eq. (A.2): logits without K, 1/(R sqrt d) sum_s a_s[h] (q . b_s). Q and B are rotated. -> [b,h,q,k].
    R dot products per key instead of one, but fewer numbers to read, and decoding is bound by reading the cache.
    """
    (s, d), n = B_bksd.shape[2:], Q_bqhd.shape[2] // A_bksg.shape[3]
    dots_bqhks = np.einsum("bqhd,bksd->bqhks", Q_bqhd, B_bksd)
    A_bksh = np.repeat(A_bksg, n, axis=3)  # query head h belongs to KV head h // n
    return np.einsum("bksh,bqhks->bhqk", A_bksh, dots_bqhks) / (s * d**0.5)


def visible(positions_bq: Array, positions_bk: Array, window: float = np.inf) -> Array:
    """A query at i sees a key at j if 0 <= i - j < window: itself and window - 1 before it. -> [b,1,q,k]."""
    distance_b1qk = positions_bq[:, None, :, None] - positions_bk[:, None, None, :]
    return (distance_b1qk >= 0) & (distance_b1qk < window)


def softmax(L_bhqk: Array, seen_b1qk: Array | bool = True) -> Array:
    """exp(L) / sum exp(L) over the keys that a query sees. -> [b,h,q,k]."""
    L_bhqk = np.where(seen_b1qk, L_bhqk, -np.inf)
    exp_bhqk = np.exp(L_bhqk - L_bhqk.max(3, keepdims=True))  # the maximum cancels; it keeps exp from overflowing
    return exp_bhqk / exp_bhqk.sum(3, keepdims=True)


def values(P_bhqk: Array, A_bkug: Array, B_bkue: Array) -> Array:
    """Eq. (A.3): outputs without V, 1/R sum_k sum_u (p a_u[h]) b_u, where p a is a single number. -> [b,q,h,e]."""
    A_bkuh = np.repeat(A_bkug, P_bhqk.shape[1] // A_bkug.shape[3], axis=3)
    weights_bhqku = np.einsum("bhqk,bkuh->bhqku", P_bhqk, A_bkuh)
    return np.einsum("bhqku,bkue->bqhe", weights_bhqku, B_bkue) / B_bkue.shape[2]


def attention(
    Q_bqhd: Array, AK_bksg: Array, BK_bksd: Array, AV_bkug: Array, BV_bkue: Array, seen_b1qk: Array | bool = True
) -> Array:
    """Algorithm 1: attention from factors. The paper's Q is a tensor_product too; Gemma's is dense. -> [b,q,h,e]."""
    return values(softmax(scores(Q_bqhd, AK_bksg, BK_bksd), seen_b1qk), AV_bkug, BV_bkue)


class Cache:
    """What the tokens of one layer leave behind: arrays [b,slots,...], read up to the last filled slot.

    Token p lies in slot p mod slots. A global layer has a slot for every token. A window layer has w slots, a ring:
    token p replaces token p - w, which no later query sees. So all that is stored is visible, and a new query needs no
    mask. The order of the slots does not matter: attention sums over keys, and a key's position is in its rotation.
    """

    def __init__(self, slots: int) -> None:
        self.slots, self.length = slots, 0
        self.arrays: list[Array] = []

    def append(self, *token: Array) -> None:
        """Store the arrays of one token, [b,1,...] each; the first token allocates all slots."""
        self.arrays = self.arrays or [np.zeros((x.shape[0], self.slots, *x.shape[2:]), x.dtype) for x in token]
        for array, x in zip(self.arrays, token):
            array[:, self.length % self.slots] = x[:, 0]
        self.length += 1

    def read(self) -> list[Array]:
        return [array[:, : self.length] for array in self.arrays]


def show(equation: str, statement: str, ours: Array, expected: Array) -> None:
    """Print a statement and its largest error, relative to the largest number."""
    print(f"{equation:9}{statement:72}{np.abs(ours - expected).max() / np.abs(expected).max():.0e}")


def main() -> None:
    """Both sides of every equation on random arrays, and how far apart they are."""
    tokens, g, n, d, R, w = 6, 4, 2, 16, 2, 3
    rng = np.random.default_rng(0)
    Q_bqhd, K_bkgd, V_bkge = (rng.standard_normal((1, tokens, heads, d)) for heads in (g * n, g, g))
    at_bk = np.arange(tokens)[None]  # the position of each token
    print(f"{tokens} random tokens, {g * n} query heads, g = {g} KV heads of d = {d} features{'error':>25}\n")
    show("Eq. 3.1", f"K = 1/R sum a_r (x) b_r, exact at R = g = {g}", tensor_product(*factor(K_bkgd, g)), K_bkgd)
    (AK_bksg, BK_bksd), (AV_bkug, BV_bkue) = factor(K_bkgd, R), factor(V_bkge, R)
    KR_bkgd, VR_bkge = tensor_product(AK_bksg, BK_bksd), tensor_product(AV_bkug, BV_bkue)
    lost_bk, sigma_bks = ((K_bkgd - KR_bkgd) ** 2).sum((2, 3)), np.linalg.svd(K_bkgd, compute_uv=False)
    statement = f"R = {R}: squared error = discarded sigma^2, {lost_bk.sum() / (K_bkgd**2).sum():.0%} of a random K"
    show("", statement, lost_bk, (sigma_bks[..., R:] ** 2).sum(2))
    Q_bqhd, BK_bksd, KR_bkgd = (rope(x, at_bk) for x in (Q_bqhd, BK_bksd, KR_bkgd))
    show("Eq. 3.5", "RoPE(A^T B) = A^T RoPE(B): only b is rotated", tensor_product(AK_bksg, BK_bksd), KR_bkgd)

    K_bkhd, V_bkhe = np.repeat(KR_bkgd, n, axis=2), np.repeat(VR_bkge, n, axis=2)  # formed only to compare with
    L_bhqk = np.einsum("bqhd,bkhd->bhqk", Q_bqhd, K_bkhd) / d**0.5
    show("Eq. A.2", "1/R sum_s a_s (q . b_s) = q . k: logits without K", scores(Q_bqhd, AK_bksg, BK_bksd), L_bhqk)
    factors = AK_bksg, BK_bksd, AV_bkug, BV_bkue
    for layer, slots in ("global", tokens), ("window", w):
        P_bhqk = softmax(L_bhqk, visible(at_bk, at_bk, slots))
        O_bqhe = np.einsum("bhqk,bkhe->bqhe", P_bhqk, V_bkhe)
        print(f"\nA {layer} layer of {slots} slots, against dense attention")
        show("Eq. A.3", "1/R sum_u (p a_u) b_u = p v: outputs without V", values(P_bhqk, AV_bkug, BV_bkue), O_bqhe)
        cache = Cache(slots)
        for i in range(tokens):
            cache.append(at_bk[:, [i]], *(x[:, [i]] for x in factors))
            held_bk, *held = cache.read()
            show("Alg. 1", f"token {i} reads {held_bk[0]}", attention(Q_bqhd[:, [i]], *held), O_bqhe[:, [i]])

    print(f"\nBytes per token and layer, K and V in bfloat16{'dense':>15}{'R = 1':>9}{'R = 2':>9}{'R = g':>9}")
    for size, g, d in ("1B", 1, 256), ("4B", 4, 256), ("12B", 8, 256), ("27B", 16, 128):
        numbers = g * d, g + d, min(2, g) * (g + d), g * (g + d)  # g d as a matrix, R (g + d) as factors; V the same
        print(f"Gemma 3 {size:5} g = {g:2}, d = {d}{'':26}", *(f"{2 * 2 * count:8,}" for count in numbers))
    print("R = g is exact but larger than dense. One KV head has nothing to share: 257 numbers for 256.")


if __name__ == "__main__":
    main()
