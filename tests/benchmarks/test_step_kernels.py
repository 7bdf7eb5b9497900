"""Which kernel adds how much to a step, from spans that overlap."""

from benchmarks.step_kernels import Span, kernels


def test_a_kernel_adds_what_is_between_the_end_of_the_one_before_and_its_own() -> None:
    """The second begins early and waits for the first; the third follows a gap. Twice, so two steps."""
    step = [("product", 0.0, 10.0), ("norm", 2.0, 13.0), ("product", 15.0, 25.0)]
    spans = [Span(name, begin + 30.0 * i, end + 30.0 * i) for i in range(2) for name, begin, end in reversed(step)]
    rows = {(row["after"], row["kernel"]): row for row in kernels(spans, 2)}
    assert rows["product", "norm"]["added_microseconds"] == 3.0
    assert rows["product", "norm"]["microseconds"] == 11.0
    assert rows["norm", "product"] == {
        "kernel": "product",
        "after": "norm",
        "each_step": 1.0,
        "microseconds": 10.0,
        "added_microseconds": 12.0,
    }
    assert sum(row["added_microseconds"] for row in rows.values()) == 55.0 / 2
    assert kernels([], 1) == []
