"""The files that start Ray: they fill in, and what would read them takes them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
NEEDED = {
    "KA2L_HEAD_IP": "10.0.0.4",
    "KA2L_WORKER_IPS": "10.0.0.5, 10.0.0.6",
    "KA2L_INSTANCE_PROFILE": "arn:aws:iam::123456789012:instance-profile/runs",
}
LAUNCHED = ["on-premises.yaml", "aws.yaml"]


def filled(name: str, **values: str) -> str:
    done = subprocess.run(
        [sys.executable, str(CLUSTER / "fill.py"), name],
        env={"PATH": os.environ["PATH"], **NEEDED, **values},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("name", LAUNCHED)
def test_rays_launcher_takes_the_file(name: str) -> None:
    import jsonschema
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(filled(name))
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(config | {"hed_node_type": "head"}, schema)


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_asks_for_a_token_and_its_dashboard_stays_on_loopback(name: str) -> None:
    config = yaml.safe_load(filled(name))
    assert "~/.ray/auth_token" in config["file_mounts"].values()
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        assert "RAY_AUTH_MODE=token" in start
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def crd_schema() -> dict[str, Any]:
    """Schema of a RayJob, as strict as the API server with --validate=strict: no field that it does not know."""
    path = os.environ.get("KUBERAY_RAYJOB_CRD")
    if path is None:
        pytest.skip("KUBERAY_RAYJOB_CRD does not name KubeRay's ray.io_rayjobs.yaml")
    crd = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in crd["spec"]["versions"] if v["name"] == "v1"]

    def tighten(part: Any) -> None:
        if isinstance(part, list):
            for item in part:
                tighten(item)
        elif isinstance(part, dict):
            if part.get("x-kubernetes-int-or-string"):
                part.pop("type", None)
            if "properties" in part and not part.get("x-kubernetes-preserve-unknown-fields"):
                part.setdefault("additionalProperties", False)
            for item in list(part.values()):
                tighten(item)

    tighten(schema)
    schema["properties"]["metadata"] = {"type": "object"}
    return dict(schema)


def test_the_rayjob_keeps_to_the_schema_of_its_crd() -> None:
    import jsonschema

    schema = crd_schema()
    job = next(yaml.safe_load_all(filled("kuberay-rayjob.yaml")))
    jsonschema.validate(job, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**job, "spec": {**job["spec"], "entrypont": "ka2l"}}, schema)


def test_the_rayjob_asks_for_a_token_and_lets_in_its_own_pods_alone() -> None:
    import ray

    job, policy = yaml.safe_load_all(filled("kuberay-rayjob.yaml", KA2L_CLUSTER="facts"))
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ka2l-token"}
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    labels = policy["spec"]["podSelector"]["matchLabels"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(labels.items() <= group["template"]["metadata"]["labels"].items() for group in groups)
    assert policy["spec"]["policyTypes"] == ["Ingress"]


@pytest.mark.parametrize("missing", sorted(NEEDED))
def test_what_has_no_default_is_named_when_it_is_missing(missing: str) -> None:
    name = "aws.yaml" if "PROFILE" in missing else "on-premises.yaml"
    environment = {key: value for key, value in NEEDED.items() if key != missing}
    done = subprocess.run(
        [sys.executable, str(CLUSTER / "fill.py"), name], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert missing in done.stderr
    assert done.stdout == ""


def test_filling_in_touches_ka2ls_own_variables_alone_and_knows_no_others() -> None:
    spec = importlib.util.spec_from_file_location("fill", CLUSTER / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.fill("${KA2L_CLUSTER} $RAY_HEAD_IP ${HOME}", {"KA2L_CLUSTER": "a"}) == "a $RAY_HEAD_IP ${HOME}"
    texts = "".join((CLUSTER / name).read_text() for name in [*LAUNCHED, "kuberay-rayjob.yaml"])
    assert all(f"${{{name}}}" in texts for name in module.DEFAULTS)


def test_the_slurm_script_is_sound_shell_and_says_how_it_is_used() -> None:
    script = str(CLUSTER / "slurm.sh")
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage: sbatch" in done.stderr
