"""scripts/reproduce/any_vit.sh: a model of timm gets a remedy, is fine-tuned, analysed and exported, in one go."""

import json
import sys
from pathlib import Path

import pytest
from runs import ROOT, Run, environment, expect

from reporting import EpochLog


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The repository by links, with this environment in place of the script's own, so that data/ is not the user's."""
    copy = tmp_path / "repository"
    (copy / "scripts").mkdir(parents=True)
    for path in (*ROOT.glob("*.py"), *(ROOT / name for name in ("models", "oversmoothing", "readers"))):
        (copy / path.name).symlink_to(path)
    for path in (ROOT / "scripts").iterdir():
        if path.name != "setup_env.sh":
            (copy / "scripts" / path.name).symlink_to(path)
    (copy / "scripts" / "setup_env.sh").write_text(f'PYTHON="{sys.executable}"\n')
    script = copy / "scripts" / "reproduce.sh"  # a link to the folder would lead out of the copy
    script.write_text((ROOT / "scripts" / "reproduce" / "any_vit.sh").read_text().replace("/../..", "/.."))
    return copy


@pytest.mark.slow
def test_a_model_of_timm_goes_through_everything(repository: Path) -> None:
    env = environment(EPOCHS="1", MODEL_KWARGS="embed_dim=32 depth=2 num_heads=2 patch_size=8", REMEDY="gfsa attnscale")
    with Run(["bash", str(repository / "scripts" / "reproduce.sh")], env, cwd=repository) as started:
        output = expect(started, timeout=400).stdout
    logs = repository / "logs" / "any_vit"
    assert "2 process(es) on CPU" in output and "left at initial value: blocks.*.attn." in output
    assert [line["epoch"] for line in EpochLog.read(logs / "log.txt")] == [0]
    rows = (logs / "analysis" / "analysis.csv").read_text()
    assert '"after, gfsa attnscale"' in rows and "gfsa_beta" in rows and "lamb" in rows
    about = json.loads((logs / "model.json").read_text())
    assert about["model"] == "vit_small_patch16_dinov3" and "checked: logits within" in output
