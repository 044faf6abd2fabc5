"""Does a distilled student follow the data's top eigendirections even more than gradient descent does by itself?

*On student-teacher deviations in distillation* (Nagarajan et al. 2023, arXiv 2301.12923) says so: gradient descent learns
along the top eigenvectors of the data first, and distillation exaggerates that. Here is the theory it is shown in, linear
regression under gradient flow (`LinearFlow`, `one_hot_time`), the directions of any layer's inputs (`layer_directions`),
and the comparison of two training runs in them (`compare`). `hfkd.diagnostics.trajectory` records such runs.

Reconstruction, not verified: there is no released code. The student's filter is the paper's; the other closed forms are
recalled and were derived again. The procedure for networks is recalled; the paper's widths, eigen-indices and rates, whether
its covariance is centred, and how it counts pairs are not known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from hfkd.diagnostics.trajectory import Trajectory

Array = NDArray[np.float64]
LEVELS = 50  # values of c_i at which two runs are compared


# ---- linear regression under gradient flow ----


class LinearFlow:
    """Gradient flow of |X theta - y|^2 / 2 from theta = 0, for the teacher, its student, and the student's students.

    inputs X: (rows, features); targets y: (rows,). The methods take times, each a number or an array: `t` alone is training
    on the targets for that long (the teacher, or the one-hot run); `student_time, teacher_time` is training on the predictions
    of a teacher that was stopped; each further time is that of a teacher's teacher. Arrays are broadcast, and their shape
    comes first in the answer. With X X^T = sum_k lambda_k u_k u_k^T and v_k = X^T u_k / sqrt(lambda_k):

        v_k . theta = (u_k . y / sqrt(lambda_k)) * (1 - exp(-lambda_k t)), times one more such factor for each further time

    eigenvalues: (k,), decreasing, those above the rounding of the largest. vectors: v_k as columns, (features, k).
    Raises ValueError for shapes that do not fit, values that are not finite (rows named) and times below 0.
    """

    def __init__(self, inputs: ArrayLike, targets: ArrayLike):
        rows, wanted = _finite_rows(inputs, "inputs"), np.asarray(targets, dtype=np.float64)
        if wanted.shape != (len(rows),):
            raise ValueError(
                f"inputs have {len(rows)} rows, and targets the shape {wanted.shape}: one number a row is needed"
            )
        _finite_rows(wanted[:, None], "targets")
        left, singular, right = np.linalg.svd(rows, full_matrices=False)
        kept = singular > singular[0] * max(rows.shape) * np.finfo(np.float64).eps
        self.eigenvalues: Array = singular[kept] ** 2
        self.vectors: Array = right[kept].T
        self._left, self._singular = left[:, kept], singular[kept]
        self._along: Array = self._left.T @ wanted  # u_k . y

    def coefficients(self, *times: ArrayLike) -> Array:
        """v_k . theta: (..., k)."""
        return self._along / self._singular * progress(self.eigenvalues, *times)

    def weights(self, *times: ArrayLike) -> Array:
        """theta: (..., features)."""
        return self.coefficients(*times) @ self.vectors.T

    def predictions(self, *times: ArrayLike) -> Array:
        """X theta on the training rows: (..., rows). Of one time: (I - exp(-t X X^T)) y."""
        return (self._along * progress(self.eigenvalues, *times)) @ self._left.T


def progress(eigenvalues: ArrayLike, *times: ArrayLike) -> Array:
    """prod over times of (1 - exp(-lambda t)): the share of the way to the least-squares solution, (..., k)."""
    exponents = _exponents(eigenvalues, times)
    return np.prod(np.stack(np.broadcast_arrays(*(-np.expm1(-each) for each in exponents))), axis=0)


def one_hot_time(eigenvalues: ArrayLike, *times: ArrayLike) -> Array:
    """How long the one-hot run takes to come as far as the student in each direction: t with progress(lambda, t) equal to
    progress(lambda, student_time, teacher_time, ...), (..., k).

    The claim of section 2.4 in one word: this *rises* with the eigenvalue. At the time at which the one-hot run equals the
    student in direction i it has gone on, in every direction of a smaller eigenvalue, for longer than it took to equal the
    student there. (Rising from 0, since t is about lambda * student_time * teacher_time for small lambda, to the smaller
    of the two times.) From expm1 and log1p, so that neither end cancels; where exp(-lambda t) is below the rounding of the
    other time's, two eigenvalues' answers can be equal.
    """
    exponents = _exponents(eigenvalues, times)
    share = progress(eigenvalues, *times)
    with np.errstate(divide="ignore", invalid="ignore"):  # both branches are computed everywhere
        missing = -exponents[0]  # log of (1 - share) of the times so far
        for each in exponents[1:]:  # 1 - (1 - x)(1 - y) = x + y (1 - x)
            missing = np.logaddexp(missing, _log_one_minus_exp(missing) - each)
        missing = np.where(share < 0.5, np.log1p(-share), missing)
    return -missing / np.asarray(eigenvalues, dtype=np.float64)


def _log_one_minus_exp(x: Array) -> Array:
    """log(1 - exp(x)) for x <= 0."""
    return np.where(x > -np.log(2), np.log(-np.expm1(x)), np.log1p(-np.exp(x)))


def _exponents(eigenvalues: ArrayLike, times: Sequence[ArrayLike]) -> list[Array]:
    values = np.asarray(eigenvalues, dtype=np.float64)
    if values.ndim != 1 or not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"eigenvalues are one row of finite numbers above 0, got {values}")
    if not times:
        raise ValueError("a time is missing: one for the one-hot run, or student_time, teacher_time")
    found = [np.asarray(time, dtype=np.float64) for time in times]
    for time in found:
        if not (np.isfinite(time) & (time >= 0)).all():
            raise ValueError(f"times are finite and 0 or above, got {time}")
    return [time[..., None] * values for time in found]


# ---- directions ----


@dataclass(frozen=True)
class Directions:
    """Eigenvectors of a covariance as columns, (width, k), and their eigenvalues, (k,), in decreasing order.

    Each vector's entry of the largest size is positive, so that one covariance gives one set of directions.
    """

    eigenvalues: Array
    vectors: Array

    def __post_init__(self) -> None:
        values, vectors = self.eigenvalues, self.vectors
        if vectors.ndim != 2 or values.shape != vectors.shape[1:]:
            raise ValueError(f"eigenvalues {values.shape} and vectors {vectors.shape} must be (k,) and (width, k)")

    @property
    def rank(self) -> int:
        """How many eigenvalues are not rounding: the data move in these directions, and weights are only learned there."""
        if not len(self.eigenvalues) or self.eigenvalues[0] <= 0:
            return 0
        return int((self.eigenvalues > 1e-6 * self.eigenvalues[0]).sum())

    def at(self, places: Sequence[int]) -> Directions:
        """Some of them; the top direction has place 0. Raises ValueError for places beyond the rank."""
        odd = [place for place in places if not 0 <= place < self.rank]
        if odd:
            raise ValueError(f"there are directions 0 to {self.rank - 1}, the rank of the covariance, not {odd}")
        return Directions(self.eigenvalues[list(places)], self.vectors[:, list(places)])


def covariance_directions(rows: ArrayLike, *, centred: bool = True) -> Directions:
    """Of inputs, features or patches, (rows, width).

    centred=False: of X^T X / rows, what the theory of section 2.4 (without a bias) has; the mean is then a direction, too.
    Raises ValueError for rows that are not finite, naming them.
    """
    moments = _Moments()
    moments.add(_finite_rows(rows, "rows"))
    return moments.directions(centred)


def layer_directions(
    model: Any, layer: str, batches: Iterable[Mapping[str, Any]], *, centred: bool = True
) -> Directions:
    """Directions of what a layer of any model reads: the first layer's are those of the inputs, the head's those of the
    features, and a convolution's those of the patches that it sees (zero padding included).

    layer: name of an nn.Linear (every token is a row, padding too) or nn.Conv1d, 2d or 3d. batches: what the model is called
    with; it runs in eval mode without gradients, with its training flags restored. `weight.flatten(1) @ vectors` are the
    layer's projections. Raises ValueError for an unknown layer, for other kinds, grouped convolutions and circular padding,
    and for inputs that are not finite.
    """
    import torch

    module, moments = layer_of(model, layer), _Moments()

    def look(_: Any, inputs: tuple[Any, ...]) -> None:
        moments.add(
            _finite_rows(rows_read(module, inputs[0].detach()).cpu().double().numpy(), f"the inputs of {layer}")
        )

    flags = {each: each.training for each in model.modules()}
    handle = module.register_forward_pre_hook(look)
    try:
        model.eval()
        with torch.no_grad():
            for batch in batches:
                model(**batch)
    finally:
        handle.remove()
        for each, training in flags.items():
            each.training = training
    return moments.directions(centred)


def layer_of(model: Any, layer: str) -> Any:
    """The module of this name. Raises ValueError where its weights are not one matrix that multiplies rows of its input."""
    from torch import nn

    modules = dict(model.named_modules())
    fitting = [name for name, module in modules.items() if isinstance(module, _multiplying())]
    if layer not in fitting:
        kind = type(modules[layer]).__name__ if layer in modules else "no module"
        raise ValueError(f"{layer!r} is {kind} here: the first of the layers with weights are {', '.join(fitting[:8])}")
    module = modules[layer]
    if not isinstance(module, nn.Linear) and (module.groups != 1 or module.padding_mode != "zeros"):
        raise ValueError(
            f"{layer} has groups={module.groups} and padding_mode={module.padding_mode!r}: only convolutions whose "
            "filters all see one patch, padded with zeros, have directions in common"
        )
    return module


def _multiplying() -> tuple[type, ...]:
    from torch import nn

    return nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d


def rows_read(module: Any, inputs: Any) -> Any:
    """What the layer's weights multiply, (rows, width): tokens, or patches in the order of `weight.flatten(1)`."""
    import torch.nn.functional as F
    from torch import nn

    if isinstance(module, nn.Linear):
        return inputs.reshape(-1, inputs.shape[-1])
    axes = len(module.kernel_size)
    if inputs.dim() == axes + 1:
        inputs = inputs[None]
    if module.padding != "valid":
        inputs = F.pad(inputs, module._reversed_padding_repeated_twice)
    for axis in range(axes):  # one axis at a time: (batch, channels, places..., sizes of the kernel...)
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        inputs = inputs.unfold(2 + axis, reach, module.stride[axis])[..., :: module.dilation[axis]]
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    return inputs.permute(order).reshape(-1, module.weight[0].numel())


class _Moments:
    """Mean and second moment of rows that do not all fit into memory, in float64."""

    def __init__(self) -> None:
        self.count, self.mean, self.scatter = 0, np.zeros(0), np.zeros((0, 0))

    def add(self, rows: Array) -> None:
        """Chan et al.'s update: sums of squares of data far from 0 would cancel."""
        mean = rows.mean(0)
        scatter = (rows - mean).T @ (rows - mean)
        if self.count:
            apart = mean - self.mean
            count = self.count + len(rows)
            scatter += self.scatter + np.outer(apart, apart) * self.count * len(rows) / count
            mean = self.mean + apart * len(rows) / count
        self.count, self.mean, self.scatter = self.count + len(rows), mean, scatter

    def directions(self, centred: bool) -> Directions:
        if self.count < 2:
            raise ValueError(
                f"a covariance needs 2 rows or more, not {self.count}: the batches are empty, or never reach the layer"
            )
        matrix = self.scatter / self.count
        if not centred:
            matrix = matrix + np.outer(self.mean, self.mean)
        values, vectors = np.linalg.eigh(matrix)
        values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
        signs = np.sign(vectors[np.abs(vectors).argmax(0), np.arange(vectors.shape[1])])
        return Directions(values.copy(), vectors * signs)


# ---- two runs from one start ----


@dataclass(frozen=True)
class Comparison:
    """Do the distilled run's curves (c_i, c_j) lie on the side of the top direction?

    gaps: (k, k), at [i, j] with i < j the mean, over values of c_i that both runs pass, of the distilled run's c_j minus the
    one-hot run's, in units of c; below 0 where the claim holds. nan elsewhere, and where c_i of one of the two never rises
    above its start. share: of the pairs that can be compared, those below 0 (nan where there is none). pairs: how many
    can. skipped: how many cannot.
    """

    gaps: Array
    share: float
    pairs: int
    skipped: int


def compare(one_hot: Trajectory, distilled: Trajectory, *, moves: bool = False) -> Comparison:
    """Pairs (i, j) of two runs from one start, i the direction of the larger eigenvalue.

    c_k is the size of the projection, |W v_k|; with moves=True that of what was learned, |(W - W_start) v_k|, as in the theory,
    where weights start at 0. A run passes a value of c_i when it first reaches it; between records it moves in a straight
    line, so record often while weights move fast. Pairs of one run hang together, as they share directions: an interval for
    the share comes from several seeds, not from the number of pairs. Two one-hot runs of other row orders are the control.
    Raises ValueError for runs of other directions or another start, and for fewer than two records.
    """
    first, second = (np.abs(run.moves if moves else run.projections) for run in (one_hot, distilled))
    _refuse_other_runs(one_hot, distilled)
    count = first.shape[1]
    gaps = np.full((count, count), np.nan)
    for i in range(count):
        top = min(first[:, i].max(), second[:, i].max())
        if top <= first[0, i]:
            continue
        levels = np.linspace(first[0, i], top, LEVELS + 1)[1:]
        ours, theirs = (_when_passing(curve[:, i], levels, curve) for curve in (second, first))
        gaps[i, i + 1 :] = (ours - theirs).mean(0)[i + 1 :]
    found = gaps[np.isfinite(gaps)]
    possible = count * (count - 1) // 2
    share = float((found < 0).mean()) if found.size else float("nan")
    return Comparison(gaps, share, found.size, possible - found.size)


def _when_passing(along: Array, levels: Array, curve: Array) -> Array:
    """(records,), (levels,), (records, k) -> the curve where `along` first reaches each level, (levels, k)."""
    after = np.searchsorted(np.maximum.accumulate(along), levels)
    part = (levels - along[after - 1]) / (along[after] - along[after - 1])
    return curve[after - 1] + part[:, None] * (curve[after] - curve[after - 1])


def _refuse_other_runs(one_hot: Trajectory, distilled: Trajectory) -> None:
    for name, run in (("one-hot", one_hot), ("distilled", distilled)):
        if len(run.steps) < 2:
            raise ValueError(f"the {name} run has {len(run.steps)} records: record at least the start and one step")
        for values in (run.projections, run.moves):
            _finite_rows(values, f"the records of the {name} run")
    if one_hot.directions != distilled.directions or one_hot.projections.shape[1] != distilled.projections.shape[1]:
        raise ValueError(
            "the two runs were recorded along other directions: compute them once and record both runs along them"
        )
    if one_hot.steps[0] != distilled.steps[0] or not np.allclose(
        one_hot.projections[0], distilled.projections[0], rtol=1e-5
    ):
        raise ValueError(
            f"the two runs have other starts, {one_hot.projections[0]} at step {one_hot.steps[0]} and "
            f"{distilled.projections[0]} at step {distilled.steps[0]}: train both from the same weights"
        )


def _finite_rows(rows: ArrayLike, what: str) -> Array:
    found = np.asarray(rows, dtype=np.float64)
    if found.ndim != 2 or not found.size:
        raise ValueError(f"{what} must be a matrix of rows, (rows, width), got the shape {found.shape}")
    odd = np.flatnonzero(~np.isfinite(found).all(1))
    if odd.size:
        raise ValueError(f"{what} are not finite in {odd.size} of {len(found)} rows: {odd[:10].tolist()}")
    return found
