"""k-Center-Greedy, k-medoids and their optimum by exhaustive search, as plain loops."""

from __future__ import annotations

from itertools import combinations

import numpy as np


def radius(d: np.ndarray, centers: list[int]) -> float:
    return max(min(d[i, c] for c in centers) for i in range(len(d)))


def best_radius(d: np.ndarray, k: int) -> float:
    return min(radius(d, list(c)) for c in combinations(range(len(d)), k))


def k_center_greedy(d: np.ndarray, k: int, first: int | None = None, fixed: tuple[int, ...] = ()) -> list[int]:
    chosen: list[int] = []
    while len(chosen) < min(k, len(d) - len(fixed)):
        centers = [*fixed, *chosen]
        free = [i for i in range(len(d)) if i not in centers]
        if not chosen and first is not None:
            chosen.append(first)
        elif not centers:
            chosen.append(0)
        else:
            gap = {i: min(d[i, c] for c in centers) for i in free}
            chosen.append(min(free, key=lambda i: (-gap[i], i)))
    return chosen


def farthest_first(d: np.ndarray, gap: np.ndarray, k: int, first: int) -> list[int]:
    """``first``, then always the item farthest from those chosen and (``gap``) from what stays."""
    chosen = [first]
    while len(chosen) < min(k, len(d)):
        free = [i for i in range(len(d)) if i not in chosen]
        far = {i: min(gap[i], *(d[i, c] for c in chosen)) for i in free}
        chosen.append(min(free, key=lambda i: (-far[i], i)))
    return chosen


def assign(d: np.ndarray, centers: list[int]) -> list[int]:
    return [min(range(len(centers)), key=lambda k: (d[i, centers[k]], k)) for i in range(len(d))]


def cost(d: np.ndarray, centers: list[int]) -> float:
    return sum(min(d[i, c] for c in centers) for i in range(len(d)))


def medoids_of(d: np.ndarray, centers: list[int], labels: list[int]) -> list[int]:
    """Each centre, or the free member of its cluster that is nearest to all of it."""
    moved = list(centers)
    for k, c in enumerate(centers):
        members = [i for i in range(len(d)) if labels[i] == k]
        if c not in members:
            continue
        free = {i: sum(d[i, j] for j in members) for i in members if i == c or i not in centers}
        limit = min(free.values()) * (1 + 1e-6)
        moved[k] = c if free[c] <= limit else min(i for i in free if free[i] <= limit)
    return moved


def k_medoids_beside(
    d: np.ndarray, gap: np.ndarray, centers: list[int], max_iterations: int = 100
) -> tuple[list[int], list[int]]:
    """Centers and sizes when items nearer (``gap``) to something that stays belong to no center."""
    centers = list(centers)
    for _ in range(max_iterations + 1):
        mine = assign(d, centers)
        labels = [-1 if gap[i] < d[i, centers[mine[i]]] else mine[i] for i in range(len(d))]
        moved = medoids_of(d, centers, labels)
        if moved == centers:
            break
        centers = moved
    return centers, [labels.count(k) for k in range(len(centers))]


def k_medoids(d: np.ndarray, centers: list[int], max_iterations: int = 100) -> tuple[list[int], list[float]]:
    centers = list(centers)
    costs = [cost(d, centers)]
    for _ in range(max_iterations):
        labels = assign(d, centers)
        moved = medoids_of(d, centers, labels)
        if moved == centers:
            break
        centers = moved
        costs.append(cost(d, centers))
    return centers, costs
