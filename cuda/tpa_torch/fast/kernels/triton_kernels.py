"""The Triton kernels: one split of the keys of one row, and the merge of the splits.

Whatever the mode, K takes one of four forms here and V one of three (`launch` brings them to it):

    K rows        logits are q . row, one row a token for each KV head (`dense`) or for all (`fixed-a`: R d numbers)
    K contextual  R rows a token, each with its weights a: sum_s a_s[g] (q . b_s), Eq. (A.2)
    K rebuilt     coefficients times a basis, rotated to the key's position, then as rows (`fixed-b`, `latent`)
    K banded      so the fast pairs of each head; slow ones by queries that have absorbed the basis (`absorbed`)
    V rows        sum of p row (`dense`, `fixed-a`, `fixed-b`, `latent`): constant factors come behind the merge
    V contextual  sum of (p a_u[g]) b_u, Eq. (A.3)
    V behind      rows of K's coefficients and V's own behind them, from the codes of both (`banded`)

All logits are in base 2. Partial sums and their log-sum-exp are float32. Lengths are read from memory and loop bounds
are run-time values, so a growing text never compiles anything anew. `stored` is always three pointers: (numbers, -, -),
(codes, scales, -) of int8, (codes, scales, minima) of int4, (codes, places, levels and scales) of spectral.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCALES = tl.constexpr(9 * 256)  # where the scales of spectral tokens begin, behind the levels of every width
GROUP = tl.constexpr(64)  # numbers that share a scale, as in `quantize.GROUP`
TILE, NODES = tl.constexpr(64), tl.constexpr(4)  # as in `banded`
# These never make a second variant; `width` and its like may, as rows of a multiple of 16 are read in wider loads.
COUNTS = ["slots", "window", "sinks", "recent", "splits", "heads", "fast", "laps"]


@triton.jit
def numbers(stored, row, column, mask, n, stride, STORE: tl.constexpr):
    """Stored numbers at rows [T,1] and columns [1,C]: [T,C] in float32 (floats as they are).

    n: numbers of a row; stride: entries of `stored[0]` from row to row.
    """
    if STORE == "float":
        x = tl.load(stored[0] + row * stride + column, mask, 0)
    elif STORE == "spectral":
        x = unpacked(stored[0] + row * stride, stored, column, mask, n)
    else:
        of_group = row * tl.cdiv(n, GROUP) + column // GROUP
        scale = tl.load(stored[1] + of_group, mask, 0).to(tl.float32)
        if STORE == "int8":
            x = tl.load(stored[0] + row * stride + column, mask, 0).to(tl.float32) * scale
        else:
            word = tl.load(stored[0] + row * stride + column // 2, mask, 0).to(tl.int32)
            code = (word >> (column % 2 * 4)) & 15
            x = code.to(tl.float32) * scale + tl.load(stored[2] + of_group, mask, 0).to(tl.float32)
    return x


@triton.jit
def unpacked(codes, stored, column, mask, n):
    """Coefficients of tokens whose bytes begin at codes [T,1] or, for each column, [T,C]; see `core.codes`: a window of
    eight bits in two bytes chooses the level, and each string of a token begins with its scale.
    """
    inside = column < n
    at = tl.load(stored[1] + column, inside, 0)
    after = tl.load(stored[1] + n + column, inside, 0)
    shift = tl.load(stored[1] + 2 * n + column, inside, 0)
    table = tl.load(stored[1] + 3 * n + column, inside, 0)
    start = tl.load(stored[1] + 4 * n + column, inside, 0)
    high = tl.load(codes + at, mask, 0).to(tl.int32)
    low = tl.load(codes + after, mask, 0).to(tl.int32)
    scale = tl.load(codes + start, mask, 0).to(tl.int32)
    window = ((high << 8 | low) >> shift) & 255
    return tl.load(stored[2] + table + window, mask, 0) * tl.load(stored[2] + SCALES + scale, mask, 0)


@triton.jit
def weights(stored, token, group, mask, n, STORE: tl.constexpr):
    """The a's of one rank of `contextual` for the KV head of each query head: columns [1,H] -> [H,T] float32."""
    return tl.trans(numbers(stored, token, group, mask, n, n, STORE).to(tl.float32))


@triton.jit
def positions(slot, length, slots):
    """Position of the token in each slot: the newest p < length with p mod slots = slot (C's % keeps the sign)."""
    back = (length - 1) % slots - slot
    return length - 1 - tl.where(back < 0, back + slots, back)


@triton.jit
def visible(position, query, window, sinks, recent, SEGMENT: tl.constexpr):
    """`masks.visible` and `masks.segment_mask` of one query; a padding row asks from position -1 and sees nothing."""
    seen = (position <= query) & (query - position < window)
    sink = position < sinks
    near = query - position < recent
    if SEGMENT == "sinks":
        seen = seen & sink
    elif SEGMENT == "recent":
        seen = seen & near & (position >= sinks)
    else:
        seen = seen & (position >= sinks) & (query - position >= recent)
    return seen


@triton.jit
def rebuilt(
    L, Q1, Q2, stored, row, inside, position, count, rank, stride, constant, tables, group, basis_group, basis_row,
    DOT: tl.constexpr, STORE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, HALF: tl.constexpr,
    PAIRS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Logits of queries, by halves [H,HALF], and one head of K: coefficients times basis plus mean, rotated.

    count: the first coefficients, of rank, that are read. Tables have PAIRS columns, of which the first HALF are read.
    """
    d = tl.arange(0, HALF)
    first = tl.zeros((BLOCK_T, HALF), tl.float32)
    second = tl.zeros((BLOCK_T, HALF), tl.float32)
    if MEAN:
        mean = constant[1] + group * 2 * HALF + d
        first += tl.load(mean).to(tl.float32)[None, :]
        second += tl.load(mean + HALF).to(tl.float32)[None, :]
    for start in range(0, count, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        kept = r < count
        C = numbers(stored, row, r[None, :], inside[:, None] & kept[None, :], rank, stride, STORE).to(DOT)
        at = constant[0] + group * basis_group + r[:, None] * basis_row + d[None, :]
        first = tl.dot(C, tl.load(at, kept[:, None], 0).to(DOT), first, input_precision="ieee")
        second = tl.dot(C, tl.load(at + HALF, kept[:, None], 0).to(DOT), second, input_precision="ieee")
    angle = position[:, None] * PAIRS + d[None, :]
    cos = tl.load(tables[0] + angle, inside[:, None], 0)
    sin = tl.load(tables[1] + angle, inside[:, None], 0)
    L = tl.dot(Q1, tl.trans(first * cos - second * sin).to(DOT), L, input_precision="ieee")
    return tl.dot(Q2, tl.trans(second * cos + first * sin).to(DOT), L, input_precision="ieee")


@triton.jit
def interpolated(
    U, weights, stored, row, slot, inside, is_head, rank, stride,
    DOT: tl.constexpr, STORE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Logits of slow pairs, [H,T]: absorbed queries at the nodes of a tile times coefficients, and between nodes.

    U: pointers to the row of every head and node, [H NODES], the last number of which is that of K's mean.
    """
    L = tl.zeros((BLOCK_H * NODES, BLOCK_T), tl.float32) + tl.load(U + rank, is_head, 0).to(tl.float32)[:, None]
    for start in range(0, rank, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        kept = r < rank
        C = numbers(stored, row, r[None, :], inside[:, None] & kept[None, :], rank, stride, STORE).to(DOT)
        A = tl.load(U[:, None] + r[None, :], is_head[:, None] & kept[None, :], 0).to(DOT)
        L = tl.dot(A, tl.trans(C), L, input_precision="ieee")
    node = tl.arange(0, BLOCK_H * NODES) % NODES
    L *= tl.load(weights + node[:, None] * TILE + slot[None, :] % TILE)
    return tl.sum(tl.reshape(L, (BLOCK_H, NODES, BLOCK_T)), 1)


@triton.jit(do_not_specialize=COUNTS)
def attend_split(
    q, k, k_a, v, v_a, constant, tables, query_b, length_b, partial, lse,
    slots, window, sinks, recent, splits, heads, fast, laps, rank, width, bytes_k, bytes_v,
    basis_row, basis_group, columns, scale,
    K: tl.constexpr, V: tl.constexpr, STORE_K: tl.constexpr, STORE_V: tl.constexpr,
    STORE_KA: tl.constexpr, STORE_VA: tl.constexpr,
    ROWS_K: tl.constexpr, ROWS_V: tl.constexpr, GROUPS_K: tl.constexpr, GROUPS_V: tl.constexpr,
    MEAN: tl.constexpr, SEGMENT: tl.constexpr, G: tl.constexpr, N: tl.constexpr, HEADS: tl.constexpr,
    D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attention of HEADS query heads of one row over one split of its keys: partial [b,h,split,E] and lse [b,h,split].

    q [b,h,D], D numbers each (R d of them for `fixed-a`). Grid: (blocks of heads x blocks of E, splits, b). A split
    without a visible key gives zeros and -inf.
    """
    blocks_e = tl.maximum(tl.cdiv(width, BLOCK_E), 1)
    block, split, row_b = tl.program_id(0) // blocks_e, tl.program_id(1), tl.program_id(2).to(tl.int64)
    query, length = tl.load(query_b + row_b), tl.load(length_b + row_b)
    if SEGMENT == "sinks":  # no ring: the first tokens stay
        length = tl.minimum(length, slots)
    within_h = tl.arange(0, BLOCK_H)
    head_h = block * HEADS + within_h
    is_head_h = within_h < HEADS
    group = block * HEADS // N  # the first KV head of this program
    row_k, row_v = block * HEADS // (G * N // GROUPS_K), block * HEADS // (G * N // GROUPS_V)  # of those of a token
    group_h = head_h // N
    e = tl.program_id(0) % blocks_e * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    q_hd = q + (row_b * heads + head_h[:, None]) * D
    if D <= BLOCK_D:
        Q = tl.load(q_hd + d[None, :], is_head_h[:, None] & (d < D)[None, :], 0).to(DOT)
    if K == "rebuilt":
        Q1 = tl.load(q_hd + d[None, :], is_head_h[:, None], 0).to(DOT)
        Q2 = tl.load(q_hd + BLOCK_D + d[None, :], is_head_h[:, None], 0).to(DOT)

    most = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    O_he = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
    filled = tl.minimum(slots, length)
    share = tl.cdiv(tl.cdiv(filled, BLOCK_T), splits) * BLOCK_T
    for start in range(split * share, tl.minimum(split * share + share, filled), BLOCK_T):
        slot = start + tl.arange(0, BLOCK_T)
        inside = slot < filled
        token = row_b * slots + slot
        position = positions(slot, length, slots)
        seen = inside & visible(position, query, window, sinks, recent, SEGMENT)
        of_heads = inside[:, None] & is_head_h[None, :]

        # 1) logits
        L = tl.zeros((BLOCK_H, BLOCK_T), tl.float32)
        if K == "rebuilt":
            row = (token * GROUPS_K + row_k)[:, None]
            L = rebuilt(
                L, Q1, Q2, k, row, inside, position, rank, rank, bytes_k, constant, tables, group, basis_group,
                basis_row, DOT, STORE_K, BLOCK_T, BLOCK_R, BLOCK_D, BLOCK_D, MEAN,
            )  # fmt: skip
        elif K == "banded":
            row = (token * GROUPS_K + row_k)[:, None]
            u = tl.arange(0, BLOCK_H * NODES)
            head_u = block * HEADS + u // NODES
            node = (head_u // N * tl.cdiv(slots, TILE) + start // TILE) * NODES + u % NODES
            newest = (length - 1) % slots  # behind this slot lies what is left of the lap before
            end = tl.minimum(start + BLOCK_T, filled)
            for lap in range((start > newest).to(tl.int32), (end - 1 > newest).to(tl.int32) + 1):
                row_u = (node * laps + lap) * tl.num_programs(2) + row_b
                L_lap = interpolated(
                    constant[2] + (row_u * N + head_u % N) * columns, constant[3], k, row, slot, inside,
                    u // NODES < HEADS, rank, bytes_k, DOT, STORE_K, BLOCK_H, BLOCK_T, BLOCK_R,
                )  # fmt: skip
                L = tl.where(((slot > newest).to(tl.int32) == lap)[None, :], L_lap, L)
            for of in range(group, group + G // GROUPS_K):
                own = (is_head_h & (group_h == of))[:, None]
                Q1 = tl.load(q_hd + d[None, :], own, 0).to(DOT)
                Q2 = tl.load(q_hd + D // 2 + d[None, :], own, 0).to(DOT)
                L = rebuilt(
                    L, Q1, Q2, k, row, inside, position, fast, rank, bytes_k, constant, tables, of, basis_group,
                    basis_row, DOT, STORE_K, BLOCK_T, BLOCK_R, BLOCK_D, D // 2, MEAN,
                )  # fmt: skip
        elif K == "contextual":
            for s in tl.static_range(ROWS_K):
                row = token[:, None] * ROWS_K + s
                B = numbers(k, row, d[None, :], inside[:, None] & (d < D)[None, :], D, bytes_k, STORE_K)
                a = weights(k_a, token[:, None], (s * G + group_h)[None, :], of_heads, ROWS_K * G, STORE_KA)
                L += a * tl.dot(Q, tl.trans(B.to(DOT)), input_precision="ieee")
        else:
            row = (token * GROUPS_K + row_k)[:, None]
            for first in tl.static_range(0, D, BLOCK_D):
                c = first + d
                if D > BLOCK_D:
                    Q = tl.load(q_hd + c[None, :], is_head_h[:, None] & (c < D)[None, :], 0).to(DOT)
                B = numbers(k, row, c[None, :], inside[:, None] & (c < D)[None, :], D, bytes_k, STORE_K)
                L = tl.dot(Q, tl.trans(B.to(DOT)), L, input_precision="ieee")
        L = tl.where(seen[None, :], L * scale, float("-inf"))

        # 2) softmax so far; a tile that nobody sees leaves it as it was
        highest = tl.maximum(most, tl.max(L, 1))
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        P = tl.exp2(L - shift[:, None])
        fade = tl.exp2(most - shift)
        total = total * fade + tl.sum(P, 1)
        O_he = O_he * fade[:, None]
        most = highest

        # 3) values
        inside_e = inside[:, None] & (e < width)[None, :]
        if V == "contextual":
            for u in tl.static_range(ROWS_V):
                B = numbers(v, token[:, None] * ROWS_V + u, e[None, :], inside_e, width, bytes_v, STORE_V)
                a = weights(v_a, token[:, None], (u * G + group_h)[None, :], of_heads, ROWS_V * G, STORE_VA)
                O_he = tl.dot((P * a).to(DOT), B.to(DOT), O_he, input_precision="ieee")
        else:
            row = (token * GROUPS_V + row_v)[:, None]
            if V == "behind":
                codes = tl.where((e < rank)[None, :], k[0] + row * bytes_k, v[0] + row * bytes_v)
                B = unpacked(codes, v, e[None, :], inside_e, width)
            else:
                B = numbers(v, row, e[None, :], inside_e, width, bytes_v, STORE_V)
            O_he = tl.dot(P.to(DOT), B.to(DOT), O_he, input_precision="ieee")

    nobody = total == 0
    O_he = O_he / tl.where(nobody, 1.0, total)[:, None]
    place = (row_b * heads + head_h) * splits + split
    tl.store(partial + place[:, None] * width + e[None, :], O_he, is_head_h[:, None] & (e < width)[None, :])
    of_split = tl.where(nobody, float("-inf"), most + tl.log2(tl.where(nobody, 1.0, total)))
    tl.store(lse + place, of_split, is_head_h)


@triton.jit(do_not_specialize=["splits"])
def merge_splits(partial, lse, out, lse_out, splits, width, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr):
    """Splits of one row and head weighted by exp(lse - max lse): [b,h,split,E], [b,h,split] -> [b,h,E], [b,h].

    The maximum and no other shift: so no weight overflows, and empty splits (-inf) weigh nothing. Grid: (b h, E).
    """
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    lse_s = tl.load(lse + row * splits + s, s < splits, float("-inf"))
    most = tl.max(lse_s, 0)
    shift = tl.where(most == float("-inf"), 0.0, most)
    weight_s = tl.exp2(lse_s - shift)
    total = tl.sum(weight_s, 0)
    nobody = total == 0
    inside = (s < splits)[:, None] & (e < width)[None, :]
    O_se = tl.load(partial + (row * splits + s)[:, None] * width + e[None, :], inside, 0)
    O_e = tl.sum(O_se * weight_s[:, None], 0) / tl.where(nobody, 1.0, total)
    tl.store(out + row * width + e, O_e, e < width)
    if tl.program_id(1) == 0:
        tl.store(lse_out + row, tl.where(nobody, float("-inf"), shift + tl.log2(tl.where(nobody, 1.0, total))))
