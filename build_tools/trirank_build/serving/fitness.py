"""Whether this machine and its server can run a release's ranker; asked before Triton sees it, because Triton's own
words about a plan of another GPU or version help nobody (NVIDIA/TensorRT #3130, #7613)."""

from __future__ import annotations

from pathlib import Path

from trirank import contract
from tritonclient.grpc import model_config_pb2 as pb

from trirank_build.engines.machine import Machine
from trirank_build.engines.plan import PlanManifest
from trirank_build.repository.release import load_manifest, model_config, plan_manifests
from trirank_build.serving.tritonserver import TritonBinary


def unfit(release: Path, binary: TritonBinary, machine: Machine | None = None) -> list[str]:
    """Why a release's ranker cannot run here; nothing is a good answer.

    Raises:
        BadModel: ``release`` is none.
    """
    manifest = load_manifest(release)
    runtime = manifest["runtime"]
    if runtime == "python":
        return []
    machine = machine or Machine.here()
    problems = []
    # Triton's backends of these runtimes have their names.
    if binary.backends is not None and not (binary.backends / runtime).is_dir():
        problems.append(f"the server at {binary.path} has no backend {runtime}, which NVIDIA's container has")
    gpu = model_config(release, contract.RANKER).instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    if gpu and not machine.sms:
        problems.append("there is no GPU (nvidia-smi finds none)")
    elif runtime == "tensorrt":
        problems += _plans_unfit(plan_manifests(manifest), machine)
    return problems


def _plans_unfit(plans: list[PlanManifest], machine: Machine) -> list[str]:
    problems = []
    for sm in dict.fromkeys(machine.sms):
        fitting = [plan for plan in plans if plan.runs_on(sm)]
        if not fitting:
            have = ", ".join(plan.sm for plan in plans)
            problems.append(f"sm: the plans are for {have}, the GPU is {sm}")
        for plan in fitting:
            if plan.flavour != "tensorrt":
                problems.append(
                    f"flavour: {plan.sm}.plan is of {plan.flavour}, which Triton's TensorRT backend cannot load"
                )
                continue
            if machine.tensorrt and not plan.same_version(machine.tensorrt):
                problems.append(
                    f"version: {plan.sm}.plan is of TensorRT {plan.version}, the server has {machine.tensorrt}"
                )
            if machine.cuda and plan.cuda not in ("unknown", machine.cuda):
                problems.append(f"cuda: {plan.sm}.plan is of CUDA {plan.cuda}, the server has {machine.cuda}")
    return problems
