"""The plots are there, are pictures, and are left out where they would be empty.

pytest tests/test_figures.py
"""

import io

import matplotlib.image
import matplotlib.pyplot as plt
import pytest
from made_results import made_matrix, made_run

from common.claims import compare, default_family, measure_all
from common.figures import all_plots, colors, learning_curves, legend, measure_plot, panels
from common.results import find_runs, read_runs
from common.tables import index

B3, B5 = "b3_grpo_verifier", "b5_cts"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = made_matrix(tmp_path_factory.mktemp("runs"), (B3, B5), ("gsm8k", "apps"), (0, 1), 20)
    return read_runs(find_runs([folder]))


def test_six_pictures_each_small_and_the_same_every_time(tasks):
    family = default_family(tasks, B3)
    make = lambda: all_plots(tasks, measure_all(tasks, B3), compare(tasks, family), family)
    plots = make()
    assert [caption.split(":")[0].split(" of ")[0] for caption in plots] == [
        "Comparisons", "Probability", "delta_critique", "Accuracy", "Credit", "Learning curves",
    ]  # fmt: skip
    for image in plots.values():
        pixels = matplotlib.image.imread(io.BytesIO(image))
        assert pixels.shape[0] > 100 and pixels.shape[1] >= 600 and pixels.std() > 0.01
        assert len(image) < 200_000
    assert make() == plots


def test_what_would_be_empty_is_not_there(tmp_path):
    def without_credit(result):
        for r in result["records"]:
            r["credit_excess"] = None

    run = made_run(tmp_path, B3, "gsm8k", 0, 8, change=without_credit)
    (run / "metrics.jsonl").unlink()
    tasks = read_runs([run])
    family = default_family(tasks, B3)
    rows = measure_all(tasks, B3)
    assert learning_curves(tasks) is None
    assert measure_plot(tasks, index(rows), "credit_excess", "excess", 1) is None
    plots = all_plots(tasks, rows, [], family)
    assert [caption.partition(" ")[0] for caption in plots] == ["delta_critique:", "Accuracy"]


def test_an_arm_has_one_color(tasks):
    found = colors(tasks)
    assert list(found) == [B3, B5] and len(set(found.values())) == 2


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("names", [[f"b{i}_method" for i in range(7)], [
    B3, B5, "b5_cts lam_align=0", "b5_cts lam_decode=0", "b5_cts lam_decode=0 target=shuffled_locus", "untrained base",
]])  # fmt: skip
def test_a_legend_is_inside_its_figure(tasks, names, several):
    figure, axes = panels(tasks if several else tasks[:1], "")
    for name in names:
        axes[0].plot([0, 1], label=name)
    legend(figure, axes)
    figure.canvas.draw()
    inside, whole = figure.legends[0].get_window_extent(), figure.bbox
    plt.close(figure)
    assert whole.x0 <= inside.x0 < inside.x1 <= whole.x1 and whole.y0 <= inside.y0
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {*names}
