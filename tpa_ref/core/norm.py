"""RMSNorm as Gemma has it."""

import numpy as np


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """x / rms(x) * (1 + w) over the last axis. Gemma stores w around zero.

    Shapes: x [..., d], w [d] -> [..., d]; computed in float32 or better, returned in x's dtype.

    >>> rms_norm(np.array([3.0, 4.0]), np.zeros(2)).round(3).tolist()
    [0.849, 1.131]
    """
    x32 = x if x.dtype == np.float64 else x.astype(np.float32)
    return (x32 * rms_scale(x32, eps) * (1 + w)).astype(x.dtype)


def rms_scale(x: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """1 / rms(x) over the last axis, kept as an axis of size one: [..., d] -> [..., 1]."""
    return 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps)
