"""The spectral cache: transform coding of K and V, with bits where the model feels them. Twin of `tpa_ref.spectral`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tpa_ref.compress.transform import FLOOR, Spectrum, allocate, damage, gaussian_bound, loss

from ..core.factorize import steady_signs

__all__ = ["FLOOR", "Spectrum", "allocate", "damage", "gaussian_bound", "loss"]


def spectrum(M_gdgd: Tensor, mean_gd: Tensor, F: Sequence[Tensor | None]) -> Spectrum:
    """The transform of x = (K, V), or of one of them, from its second moment, its mean and its sensitivity.

    F: one Fisher matrix for each of the equal blocks of heads, or None. variance_s is NumPy's.

    Shapes: M [g,d,g,d] = E[x x^T], mean [g,d], F [g/blocks,d,g/blocks,d] each -> encoder and basis [g d, g, d],
    variance [g d].
    """
    g, d = mean_gd.shape
    mean_x = mean_gd.reshape(-1).double()
    C_xx = M_gdgd.reshape(g * d, g * d).double() - torch.outer(mean_x, mean_x)
    root_xx, inverse_xx = torch.zeros_like(C_xx), torch.zeros_like(C_xx)
    n = g * d // len(F)
    eye_xx = torch.eye(n, dtype=torch.float64, device=C_xx.device)
    for index, F_gdgd in enumerate(F):
        at = slice(index * n, (index + 1) * n)
        C_xx[at, at] += FLOOR * (C_xx[at, at].trace() / n).clamp(min=1e-30) * eye_xx
        F_xx = eye_xx / C_xx[at, at].trace() if F_gdgd is None else F_gdgd.reshape(n, n).double()
        root_xx[at, at], inverse_xx[at, at] = symmetric_root(F_xx)
    values, U_xs = torch.linalg.eigh(root_xx @ C_xx @ root_xx)
    variance_s = values.flip(0).clamp(min=1e-12 * max(float(values[-1]), 1e-30))
    U_sx = steady_signs(U_xs.flip(-1).mT)
    deviation_s1 = variance_s.sqrt()[:, None]
    encoder_sx, basis_sx = U_sx @ root_xx / deviation_s1, U_sx @ inverse_xx * deviation_s1
    return Spectrum(encoder_sx.unflatten(1, (g, d)), basis_sx.unflatten(1, (g, d)), mean_gd, variance_s.cpu().numpy())


def symmetric_root(F_xx: Tensor) -> tuple[Tensor, Tensor]:
    """(F^(1/2), F^(-1/2)) of a symmetric matrix whose eigenvalues are brought to a floor."""
    values, U = torch.linalg.eigh((F_xx + F_xx.mT) / 2)
    root = values.clamp(min=max(FLOOR * float(values.mean()), 1e-30)).sqrt()
    return (U * root) @ U.mT, (U / root) @ U.mT


def truncate_weighted(
    mode: str, rank: int, M_gdgd: Tensor, mean_gd: Tensor, F_gdgd: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """The basis of `latent` or `fixed-b` that loses least damage instead of least energy, with its encoder.

    Shapes: M, mean, F as in `spectrum` -> encoder and basis [R,g,d] (`latent`) or [g,R,d] (`fixed-b`); the share of
    the damage that is left out, as a relative norm.
    """
    g = mean_gd.shape[0]
    if mode == "latent":
        found = [spectrum(M_gdgd, mean_gd, [F_gdgd])]
    else:
        found = [
            spectrum(M_gdgd[one, :, one], mean_gd[one], [None if F_gdgd is None else F_gdgd[one, :, one]])
            for one in (slice(head, head + 1) for head in range(g))
        ]
    encoders, bases = [], []
    for one in found:
        deviation_s11 = torch.as_tensor(one.variance_s, device=mean_gd.device).sqrt()[:rank, None, None]
        encoders.append(one.encoder_sgd[:rank] * deviation_s11)
        bases.append(one.basis_sgd[:rank] / deviation_s11)
    error = loss([one.variance_s for one in found], rank)
    if mode == "latent":
        return encoders[0], bases[0], error
    return torch.cat([x.transpose(0, 1) for x in encoders]), torch.cat([x.transpose(0, 1) for x in bases]), error
