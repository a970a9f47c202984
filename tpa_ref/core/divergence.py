"""How far two predictions are apart."""

import numpy as np


def log_softmax(L_bqv: np.ndarray) -> np.ndarray:
    """Logits -> log probabilities over the last axis."""
    L_bqv = L_bqv - L_bqv.max(-1, keepdims=True)
    return L_bqv - np.log(np.exp(L_bqv).sum(-1, keepdims=True))


def kl_divergence(P_bqv: np.ndarray, Q_bqv: np.ndarray) -> np.ndarray:
    """KL(P || Q) = sum p (log p - log q) in nats, from log probabilities: [b,q,v] twice -> [b,q].

    >>> log = np.log(np.array([[[0.5, 0.5]]])), np.log(np.array([[[0.25, 0.75]]]))
    >>> kl_divergence(*log).round(4).tolist()
    [[0.1438]]
    """
    return np.maximum((np.exp(P_bqv) * (P_bqv - Q_bqv)).sum(-1), 0)
