"""The field's usual benchmarks: which of them run here, and what the others still need."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from vtc.install import install_line

if TYPE_CHECKING:
    from rich.table import Table

KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY")
"""Where lmms-eval's judges look for their key."""
CAPTIONS = ("pycocoevalcap", "pycocotools")
VIDEO = ("cv2", "av")
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "Levenshtein": "levenshtein"}
"""What a module is called in a package index, where that is another name."""


@dataclass(frozen=True)
class Benchmark:
    """`task` is lmms-eval's name, or the beginning of several names; the first entry that fits one counts."""

    task: str
    asks: str
    packages: tuple[str, ...] = ()
    judge: bool = False
    """Whether replies are scored by a model behind an API, which has to be paid for."""
    java: bool = False
    video: bool = False

    def lacking(self) -> list[str]:
        """What has to be there before its first question is asked."""
        missing = [DISTRIBUTIONS.get(name, name) for name in self.packages if find_spec(name) is None]
        found = [f"{', '.join(missing)}: {install_line('suites')}"] if missing else []
        if self.judge and not any(os.environ.get(key) for key in KEYS):
            found.append(f"a judge's key in {' or '.join(KEYS)}")
        if self.java and shutil.which("java") is None:
            found.append("java, which tokenises its captions")
        if self.video and find_spec("torchvision") is None:
            found.append("torchvision, which transformers' video processors need")
        return found


FIELD = (
    Benchmark("vqav2_val", "open questions about photographs"),
    Benchmark("gqa", "compositional questions about photographs"),
    Benchmark("vizwiz_vqa_val", "questions of blind people"),
    Benchmark("scienceqa_img", "school science, multiple choice"),
    Benchmark("textvqa_val", "reading in photographs"),
    Benchmark("pope", "objects that are not there"),
    Benchmark("mme", "yes or no, 14 abilities"),
    Benchmark("mmbench_en_dev_static", "multiple choice, 20 abilities; letters are found by rules", ("openpyxl",)),
    Benchmark("mmbench_cn_dev", "the same in Chinese; a judge reads what is no letter", ("openpyxl",), judge=True),
    Benchmark("seedbench", "multiple choice, images and frames"),
    Benchmark("mmvet", "open questions, free answers", judge=True),
    Benchmark("llava_in_the_wild", "open questions, long answers", judge=True),
    Benchmark("mmmu_val", "college exams"),
    Benchmark("mmstar", "multiple choice that needs the image"),
    Benchmark("ai2d", "diagrams, multiple choice"),
    Benchmark("chartqa", "charts"),
    Benchmark("docvqa_val", "scanned documents"),
    Benchmark("ocrbench", "reading of all kinds"),
    Benchmark("refcoco_bbox_rec", "where something is"),
    Benchmark("videomme", "videos, multiple choice", VIDEO, video=True),
)
"""The twenty that papers on visual-token compression report most."""
MORE = (
    Benchmark("mmbench", "", ("openpyxl",), judge=True),
    Benchmark("refcoco", "", CAPTIONS, java=True),
    Benchmark("coco", "", CAPTIONS, java=True),
    Benchmark("flickr30k", "", CAPTIONS, java=True),
    Benchmark("nocaps", "", CAPTIONS, java=True),
    Benchmark("mathvista", "", ("Levenshtein",), judge=True),
    Benchmark("hallusion_bench", "", judge=True),
    Benchmark("mvbench", "", VIDEO, video=True),
)


def lacking(task: str) -> list[str]:
    """What a task of lmms-eval still needs, a sentence each; of tasks that are not known here nothing is said."""
    known = next((benchmark for benchmark in (*FIELD, *MORE) if task.startswith(benchmark.task)), None)
    return [f"{task} needs {need}" for need in known.lacking()] if known else []


def table() -> Table:
    """The field's benchmarks, a line each."""
    from rich.table import Table

    grid = Table("--tasks", "what it asks", "needs", title="the field's usual benchmarks, by lmms-eval's names")
    for benchmark in FIELD:
        grid.add_row(benchmark.task, benchmark.asks, "; ".join(benchmark.lacking()) or "nothing more: it runs")
    return grid
