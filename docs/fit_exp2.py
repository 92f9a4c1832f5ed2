# SPDX-License-Identifier: MIT
"""The coefficients of 2^x on [-1/2, 1/2] that csrc/cpu/real.h holds; prints them when run.

    2^x = 1 + x (c_1 + c_2 x + ... + c_n x^(n-1))

(2^x - 1) / x is interpolated at Chebyshev nodes in 60 digits, so 2^0 is exactly 1 and the
truncation error is within a factor of two of the best polynomial's. Needs mpmath.
"""

from mpmath import chop, cos, expm1, ln, lu_solve, matrix, mp, mpf, pi

mp.dps = 60


def fit(degree: int) -> list[mpf]:
    nodes = [cos(pi * (2 * k + 1) / (2 * degree)) / 2 for k in range(degree)]
    vandermonde = matrix(degree, degree)
    values = matrix(degree, 1)
    for i, x in enumerate(nodes):
        values[i] = expm1(x * ln(2)) / x if chop(x) else ln(2)
        for j in range(degree):
            vandermonde[i, j] = x**j
    return list(lu_solve(vandermonde, values))


def worst(coefficients: list[mpf]) -> mpf:
    grid = [mpf(k) / 2000 - mpf(1) / 2 for k in range(2001)]
    error = mpf(0)
    for x in grid:
        value = mpf(0)
        for c in reversed(coefficients):
            value = value * x + c
        error = max(error, abs((1 + x * value) / mpf(2) ** x - 1))
    return error


for name, degree in (("float", 6), ("double", 11)):
    coefficients = [float(c) for c in fit(degree)]
    print(f"{name}: degree {degree}, truncation {float(worst(fit(degree))):.1e}")
    print(", ".join(c.hex() for c in coefficients))
