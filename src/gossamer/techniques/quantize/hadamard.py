"""Hadamard matrices of all orders that Sylvester's and Paley's constructions reach, and rotations fused into weights.

H has entries +-1 and H H^T = n I; H / sqrt(n) is a rotation that spreads an outlier in one channel over all of them.
Nothing is tabulated:

    Sylvester 1867      H(2 n) = [[H, H], [H, -H]], and any Kronecker product of two Hadamard matrices
    Paley 1933, I       order q + 1, q = 3 mod 4 a prime power:  I + [[0, 1^T], [-1, Q]]
    Paley 1933, II      order 2 (q + 1), q = 1 mod 4:  C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],
                        C = [[0, 1^T], [1, Q]]

with Q[a, b] = chi(a - b) over the field GF(q): 1 where a - b is a square, -1 where it is not, 0 on the diagonal. The
elements of GF(p^k) are polynomials over the integers modulo p, modulo an irreducible one that is found by trial.
The smallest multiple of 4 that none of these reach is 92.

Fusing (Ashkboos et al., "SliceGPT", 2024, section 3, computational invariance; Ashkboos et al., "QuaRot", 2024,
section 4, stage 1). An RMSNorm without a weight commutes with a rotation, norm(x Q) = norm(x) Q, since |x Q| = |x|.
So for a pre-norm model: fold each norm's weight into the layers that read it, let everything that writes the residual
stream write y Q, and everything that reads it read x Q:

    reads    W x = (W Q) (Q^T x)                 `rotate_inputs`:  W -> W Q
    writes   Q^T (W h + b)                       `rotate_outputs`: W -> Q^T W,  b -> Q^T b
    tables   each row of an embedding is what it writes: `rotate_inputs` of the table

The functions here are on tensors; they leave out LayerNorm (its mean must first be taken out of what writes the
stream) and rotations that a model computes at run time (QuaRot's stages 2 to 4 change the architecture).

Shape suffixes: O outputs, I inputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from gossamer.errors import TechniqueError

Element = tuple[int, ...]  # of GF(p^k): coefficients of a polynomial, constant first


def hadamard(order: int) -> Tensor:
    """Return an orthonormal Hadamard matrix, float64 [order, order].

    Raises TechniqueError for orders that no construction reaches, naming the nearest one that does.

    >>> (hadamard(2) * 2**0.5).round().tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    plan = _plan(order) if order > 0 else None
    if plan is None:
        near = next(n for gap in itertools.count(1) for n in (order - gap, order + gap) if n > 0 and _plan(n))
        raise TechniqueError(
            f"no construction gives a Hadamard matrix of order {order}", f"order {near} is the nearest that there is"
        )
    signs = torch.ones(1, 1, dtype=torch.float64)
    for name, size in plan:
        signs = torch.kron(signs, {"sylvester": _sylvester, "paley 1": _paley_1, "paley 2": _paley_2}[name](size))
    rotation: Tensor = signs / order**0.5
    return rotation


def random_hadamard(order: int, seed: int) -> Tensor:
    """Return `hadamard(order)` with its rows multiplied by random signs: a random rotation, float64.

    >>> torch.equal(random_hadamard(4, 0).abs(), torch.full((4, 4), 0.5, dtype=torch.float64))
    True
    """
    draw = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (order,), generator=draw, dtype=torch.float64) * 2 - 1
    return hadamard(order) * signs.unsqueeze(1)


def fold_norm(norm_weight_I: Tensor, weights_OI: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a norm weight of ones, and the weights that read the norm with its weight in their columns."""
    factors_I = norm_weight_I.double()
    return torch.ones_like(norm_weight_I), [(each.double() * factors_I).to(each.dtype) for each in weights_OI]


def rotate_inputs(weight_OI: Tensor, rotation_II: Tensor) -> Tensor:
    """Return W Q: what reads Q^T x as W reads x. An embedding's rows become those that write the rotated stream."""
    return (weight_OI.double() @ rotation_II.double()).to(weight_OI.dtype)


def rotate_outputs(
    weight_OI: Tensor, rotation_OO: Tensor, bias_O: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return (Q^T W, Q^T b): what writes Q^T y where W and b write y."""
    turned_OO = rotation_OO.double().t()
    bias = None if bias_O is None else (turned_OO @ bias_O.double()).to(bias_O.dtype)
    return (turned_OO @ weight_OI.double()).to(weight_OI.dtype), bias


@lru_cache(maxsize=4096)
def _plan(order: int) -> tuple[tuple[str, int], ...] | None:
    """Return constructions whose Kronecker product has this order: the most doublings that leave a reachable one."""
    twos = order & -order
    if twos == order:
        return (("sylvester", order),)
    if order % 4:
        return None
    doubled = twos
    while doubled >= 1:
        rest = order // doubled
        found = _factors(rest)
        if found is not None:
            return (*((("sylvester", doubled),) if doubled > 1 else ()), *found)
        doubled //= 2
    return None


def _factors(order: int) -> tuple[tuple[str, int], ...] | None:
    """Return Paley matrices whose Kronecker product has this order, one when there is one."""
    if order % 4:
        return None
    if (order - 1) % 4 == 3 and _prime_power(order - 1):
        return (("paley 1", order),)
    if (order // 2 - 1) % 4 == 1 and _prime_power(order // 2 - 1):
        return (("paley 2", order),)
    for left in range(12, int(order**0.5) + 1, 4):
        if order % left == 0 and (first := _factors(left)) and (second := _factors(order // left)):
            return (*first, *second)
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    """Return (p, k) with p^k = number, or None."""
    if number < 2:
        return None
    prime = next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)
    power = 0
    while number % prime == 0:
        number //= prime
        power += 1
    return (prime, power) if number == 1 else None


def _sylvester(order: int) -> Tensor:
    signs = torch.ones(1, 1, dtype=torch.float64)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    while len(signs) < order:
        signs = torch.kron(signs, two)
    return signs


def _paley_1(order: int) -> Tensor:
    """Return I + S with S skew: S S^T = q I, so that the rows of the sum have products q + 1 and 0."""
    skew = torch.zeros(order, order, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0], skew[1:, 1:] = 1, -1, jacobsthal(order - 1)
    return skew + torch.eye(order, dtype=torch.float64)


def _paley_2(order: int) -> Tensor:
    """Return the doubled symmetric conference matrix, its zeros filled in."""
    half = order // 2
    conference = torch.zeros(half, half, dtype=torch.float64)
    conference[0, 1:], conference[1:, 0], conference[1:, 1:] = 1, 1, jacobsthal(half - 1)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    filled = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, two) + torch.kron(torch.eye(half, dtype=torch.float64), filled)


def jacobsthal(size: int) -> Tensor:
    """Return Q[a, b] = chi(a - b) over the field with `size` elements (an odd prime power), float64."""
    found = _prime_power(size)
    assert found is not None and found[0] > 2, f"{size} is no odd prime power"
    prime, power = found
    digits = torch.tensor(list(itertools.product(range(prime), repeat=power)))  # element number -> coefficients
    weights = torch.tensor([prime ** (power - 1 - place) for place in range(power)])
    modulus = _irreducible(prime, power)
    chi = torch.full((size,), -1.0, dtype=torch.float64)
    chi[0] = 0
    for element in itertools.islice(itertools.product(range(prime), repeat=power), 1, None):
        square = _product(element, element, modulus, prime)
        chi[sum(digit * int(weight) for digit, weight in zip(square, weights, strict=True))] = 1
    rows = []
    for coefficients in digits:
        difference = (coefficients - digits) % prime
        rows.append(chi[(difference * weights).sum(1)])
    return torch.stack(rows)


def _product(a: Element, b: Element, modulus: Element, prime: int) -> Element:
    """Return a b modulo a monic polynomial whose coefficients below the leading one are `modulus`."""
    power = len(modulus)
    wide = [0] * (2 * power - 1)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            wide[i + j] += x * y
    for place in range(len(wide) - 1, power - 1, -1):
        for i, coefficient in enumerate(modulus):
            wide[place - power + i] -= wide[place] * coefficient
    return tuple(value % prime for value in wide[:power])


def _irreducible(prime: int, power: int) -> Element:
    """Return the first monic polynomial of a degree that no monic polynomial of half the degree or less divides."""
    for candidate in itertools.product(range(prime), repeat=power):
        if not any(_divides(divisor, candidate, prime) for divisor in _monic(prime, power // 2)):
            return candidate
    raise AssertionError("there is an irreducible polynomial of every degree")


def _monic(prime: int, largest: int) -> Iterator[Element]:
    for degree in range(1, largest + 1):
        yield from itertools.product(range(prime), repeat=degree)


def _divides(divisor: Element, polynomial: Element, prime: int) -> bool:
    """Say whether one monic polynomial divides another; both are given without their leading one."""
    rest = [*polynomial, 1]
    for place in range(len(rest) - 1, len(divisor) - 1, -1):
        for i, coefficient in enumerate(divisor):
            rest[place - len(divisor) + i] -= rest[place] * coefficient
        rest[place] = 0
    return all(value % prime == 0 for value in rest)
