"""The links of a run folder: to the outputs that the store has for the run's settings, and to no others."""

from collections.abc import Mapping
from typing import Any

from apr_jax.data.dataset import read_manifest
from experiments.stages import evaluate, export, report, sft, trained
from experiments.stages.run import Run


def refresh(run: Run) -> None:
    """Remove links to the outputs of other settings, with the reports made from them. Link the data and the trained
    models that the store has for the run's settings; later stages link their results themselves."""
    outputs = {"data": run.data, **trained.outputs(run, run.task.variants)}
    if run.settings.joint:
        outputs[f"sft_{sft.JOINT}"] = sft.output(run, sft.JOINT)

    def fits(name: str, note: Mapping[str, Any]) -> bool:
        if name in outputs:
            return outputs[name].fits(note)
        if note.get("inputs", {}).get("data") != run.data_fingerprint:
            return False
        if read_manifest(run.data.path) is None:
            return True  # the conditions of the prompts are not known
        stage = export if name == "export" else evaluate
        return any(output.name == name and output.fits(note) for output in stage.possible(run, note))

    run.workspace.unlink(fits, report.FILES)
    for output in outputs.values():
        run.workspace.connect(output)
