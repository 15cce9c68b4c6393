"""How op tests compare: root-mean-square error relative to the reference, by name."""

from torch import Tensor


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference (of 0 / 0, 0)."""
    assert value.shape == reference.shape, f"{tuple(value.shape)} != {tuple(reference.shape)}"
    difference = (value.double() - reference.double()).norm().item()
    size = reference.double().norm().item()
    return difference / size if size > 0 else difference


def assert_close(
    values: dict[str, Tensor], references: dict[str, Tensor], tolerance: float
) -> None:
    """Fail with the name and error of every tensor that is further off than the tolerance."""
    assert values.keys() == references.keys()
    errors = {name: relative_error(values[name], references[name]) for name in references}
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"relative error above {tolerance:g}: " + ", ".join(
        f"{name} {error:.2e}" for name, error in wrong.items()
    )
