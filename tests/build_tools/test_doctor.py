"""Every rule finds the defect that was put there, and nothing is found where nothing is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import onnx
import pytest
from support import manifest_of
from trirank_build.cli import app
from trirank_build.data.dataset import Dataset
from trirank_build.doctor.examine import examine
from trirank_build.doctor.finding import RULES, Severity
from trirank_build.doctor.repository import Repository, Surroundings
from trirank_build.engines.machine import Machine
from trirank_build.engines.plan import manifest_path
from trirank_build.errors import BadModel, BadUsage, ServeError
from trirank_build.repository.assemble import assemble
from trirank_build.repository.release import load_manifest
from typer.testing import CliRunner

ROOMY = Surroundings(cores=4, machine=Machine(("sm86",), "10.8.0.43", "12"), shared_memory=1 << 30)


def ids(place, around=ROOMY):
    return {finding.rule.id for finding in examine(place, around)}


@pytest.fixture(scope="module")
def releases(world, trained, tmp_path_factory):
    """One of each runtime."""
    folder, dataset = tmp_path_factory.mktemp("doctor"), Dataset.load(world.data)
    plan = folder / "sm86.plan"
    plan.write_bytes(b"a plan")
    manifest_path(plan).write_text(json.dumps(manifest_of(plan, world.onnx).to_json()))
    made = {"python": world.release}
    made["onnxruntime"] = assemble(trained, dataset, world.onnx, folder / "o", runtime="onnxruntime")
    made["tensorrt"] = assemble(trained, dataset, world.onnx, folder / "t", runtime="tensorrt", plans=[plan])
    return made


@pytest.fixture
def models(releases, tmp_path):
    """The repository of the release for Python, with nothing around it."""
    return shutil.copytree(releases["python"] / "models", tmp_path / "repository")


@pytest.mark.parametrize("runtime", ["python", "onnxruntime", "tensorrt"])
def test_nothing_is_wrong_with_our_own(releases, runtime):
    advice = {"REL05"} if runtime == "python" else set()  # that all stages could share one process
    assert ids(releases[runtime]) == ids(releases[runtime] / "models") == advice


def test_nothing_is_wrong_with_ours_on_two_cores(releases):
    found = ids(releases["python"], Surroundings(2, Machine((), None, None), 1 << 28, deadline_ms=1_000))
    assert found == {"REL05"}


def test_nothing_is_wrong_with_one_process_for_all_stages(world, trained, tmp_path):
    release = assemble(trained, Dataset.load(world.data), world.onnx, tmp_path, pipeline="single", engine="onnxruntime")
    assert examine(release, ROOMY) == []
    assert examine(release / "models", ROOMY) == []


def edit(model, *changes):
    """Replace in a model's config.pbtxt, by regular expressions that have to match."""

    def harm(models):
        path = models / model / "config.pbtxt"
        text = path.read_text()
        for pattern, replacement in changes:
            text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
            assert count, pattern
        path.write_text(text)

    return harm


def add(model, text):
    """Append to a model's config.pbtxt."""

    def harm(models):
        path = models / model / "config.pbtxt"
        path.write_text(f"{path.read_text()}\n{text}\n")

    return harm


def queue(policy, model="ranker"):
    """Give a model's queue a policy."""
    return edit(model, (r"dynamic_batching \{.*?\}", f"dynamic_batching {{ default_queue_policy {{ {policy} }} }}"))


def source(model, text):
    def harm(models):
        (models / model / "1" / "model.py").write_text(text)

    return harm


def remove(place):
    def harm(models):
        path = models / place
        path.unlink() if path.is_file() else shutil.rmtree(path)

    return harm


def circle(models):
    """rerank gives a tensor that preprocess waits for."""
    add("preprocess", 'input { name: "LOOP" data_type: TYPE_INT32 dims: 1 }')(models)
    add("rerank", 'output { name: "LOOP" data_type: TYPE_INT32 dims: 1 }')(models)
    edit(
        "rank",
        (r'(model_name: "preprocess")', r'\1 input_map { key: "LOOP" value: "loop" }'),
        (r'(model_name: "rerank")', r'\1 output_map { key: "LOOP" value: "loop" }'),
    )(models)


CLASS = "class TritonPythonModel:\n    def execute(self, requests):\n        "
DEFECTS = {
    "FILE01 a field that there is not": ("FILE01", add("ranker", "max_batchsize: 3")),
    "FILE02 another name": ("FILE02", edit("ranker", (r'name: "ranker"', 'name: "rankr"'))),
    "FILE03 no version": ("FILE03", remove("rank/1")),
    "FILE04 no model.py": ("FILE04", remove("rerank/1/model.py")),
    "FILE05 version 7": ("FILE05", add("ranker", "version_policy { specific { versions: [1, 7] } }")),
    "FILE07 anybody may write": ("FILE07", lambda models: (models / "ranker").chmod(0o777)),
    "FILE08 no backend": ("FILE08", lambda m: (edit("ranker", (r'backend: "python"', ""))(m), remove("ranker/1")(m), (m / "ranker" / "1").mkdir())),
    "ENS01 a step that there is not": ("ENS01", remove("rerank")),
    "ENS02 a tensor misspelt": ("ENS02", edit("rank", (r'key: "scores"', 'key: "score"'))),
    "ENS03 another type": ("ENS03", edit("ranker", (r'(name: "scores"\s+data_type: )TYPE_FP32', r"\1TYPE_FP16"))),
    "ENS04 another shape": ("ENS04", edit("rerank", (r'(name: "scores"\s+data_type: TYPE_FP32\s+dims: -1\s+dims: )\d+', r"\g<1>77"))),
    "ENS04 no batch axis": ("ENS04", edit("ranker", (r"max_batch_size: 32", "max_batch_size: 0"))),
    "ENS05 an input left open": ("ENS05", add("rerank", 'input { name: "WEIGHT" data_type: TYPE_FP32 dims: 1 }')),
    "ENS06 nothing gives it": ("ENS06", edit("rank", (r'(output_map \{\s+key: "scores"\s+value: )"scores"', r'\1"marks"'))),
    "ENS07 given twice": ("ENS07", edit("rank", (r'(output_map \{\s+key: "RANKED_IDS"\s+value: )"RANKED_IDS"', r'\1"handover"'))),
    "ENS08 in a circle": ("ENS08", circle),
    "ENS09 an output named like an input": ("ENS09", edit("rank", (r"RANKED_IDS", "ITEM_IDS"))),
    "ENS10 smaller batches": ("ENS10", edit("ranker", (r"max_batch_size: 32", "max_batch_size: 16"))),
    "ENS11 strings for ids": ("ENS11", lambda m: [edit(name, (r'(name: "ITEM_IDS"\s+data_type: )TYPE_INT64', r"\1TYPE_STRING"))(m) for name in ("rank", "preprocess")]),
    "ENS12 warm-up": ("ENS12", add("rank", 'model_warmup { name: "w" batch_size: 1 }')),
    "BATCH01 batches of one": ("BATCH01", edit("ranker", (r"max_batch_size: 32", "max_batch_size: 1"))),
    "BATCH02 shapes never meet": ("BATCH02", edit("ranker", (r'parameters \{\s+key: "candidate_buckets".*?\}\s*\}', ""))),
    "BATCH03 prefers too many": ("BATCH03", edit("ranker", (r"dynamic_batching \{", "dynamic_batching { preferred_batch_size: 64"))),
    "BATCH04 waits for company": ("BATCH04", edit("ranker", (r"dynamic_batching \{", "dynamic_batching { max_queue_delay_microseconds: 500000"))),
    "BATCH05 nobody makes batches": ("BATCH05", edit("ranker", (r"dynamic_batching \{.*?\}", ""))),
    "QUEUE02 a timeout": ("QUEUE02", queue("default_timeout_microseconds: 1000000")),
    "QUEUE02 an override": ("QUEUE02", queue("allow_timeout_override: true")),
    "QUEUE02 a largest size": ("QUEUE02", queue("max_queue_size: 8")),
    "QUEUE03 a full queue in an ensemble": ("QUEUE03", queue("max_queue_size: 8")),
    "QUEUE04 late and executed": ("QUEUE04", queue("timeout_action: DELAY default_timeout_microseconds: 1000000")),
    "RES01 instances": ("RES01", edit("ranker", (r"count: 1", "count: 40"))),
    "RES05 cached": ("RES05", add("rank", "response_cache { enable: true }")),
    "CODE01 no execute": ("CODE01", source("rerank", "class TritonPythonModel:\n    pass\n")),
    "CODE01 no Python": ("CODE01", source("rerank", "class TritonPythonModel\n")),
    "CODE02 a session at import": ("CODE02", source("ranker", f"import onnxruntime\nS = onnxruntime.InferenceSession('m')\n{CLASS}pass\n")),
    "CODE02 a thread at import": ("CODE02", source("ranker", f"import threading\nthreading.Thread(target=print).start()\n{CLASS}pass\n")),
    "CODE03 BLS": ("CODE03", source("ranker", f"{CLASS}return [pb_utils.InferenceRequest(model_name='x').exec()]\n")),
    "CODE04 no code": ("CODE04", source("ranker", f"{CLASS}raise pb_utils.TritonError('bad')\n")),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_found(models, defect):
    wanted, harm = DEFECTS[defect]
    assert wanted not in ids(models)
    harm(models)
    found = [finding for finding in examine(models, ROOMY) if finding.rule.id == wanted]
    assert found
    assert all(finding.reason and finding.rule.fix and finding.where for finding in found)


def test_defects_of_a_release(releases, tmp_path):
    def harmed(**changes):
        target = tmp_path / releases["python"].name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(releases["python"], target)
        manifest = load_manifest(target)
        for name, value in changes.items():
            manifest[name] = manifest[name] | value if isinstance(value, dict) and manifest[name] else value
        (target / "manifest.json").write_text(json.dumps(manifest))
        return target

    assert ids(harmed()) == {"REL05"}
    assert ids(harmed(contract=99)) - {"REL05"} == {"REL01"}
    assert ids(harmed(engine="abacus")) - {"REL05"} == {"REL06"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert ids(harmed()) - {"REL05"} == {"REL02"}
    assert ids(harmed(compression=[{"settings": {"kind": "prune"}}])) - {"REL05"} == {"REL03"}
    assert ids(harmed(gate={"passed": False, "failures": ["ONNX: too far"]})) - {"REL05"} == {"REL03"}
    assert ids(harmed(versions={"numpy": "99.1"})) - {"REL05"} == {"REL04"}
    (harmed() / "models" / "rerank" / "1" / "model.py").write_text("import os\n")
    assert ids(tmp_path / releases["python"].name) == {"REL01", "REL05", "CODE01"}
    shutil.copy(releases["python"] / "manifest.json", tmp_path / "m")
    (harmed() / "manifest.json").write_text("{}")
    assert ids(tmp_path / releases["python"].name) >= {"REL01"}


def test_defects_around_onnx_runtime(releases, tmp_path):
    models = shutil.copytree(releases["onnxruntime"] / "models", tmp_path / "repository")
    edit("ranker", (r'(name: "scores"\s+data_type: TYPE_FP32\s+dims: -1\s+dims: )\d+', r"\g<1>77"))(models)
    found = [f for f in examine(models, ROOMY) if f.rule.id == "FILE06"]
    assert "output scores has shape [-1, -1, 77] with its batch" in found[0].reason
    edit("ranker", (r'name: "dense"', 'name: "density"'))(models)
    reasons = " ".join(f.reason for f in examine(models, ROOMY) if f.rule.id == "FILE06")
    assert "input density is not in model.onnx" in reasons
    assert "model.onnx takes dense, which config.pbtxt does not declare" in reasons
    (models / "ranker" / "1" / "model.onnx").write_bytes(b"\xff\xff")
    assert any("cannot be read" in f.reason for f in examine(models, ROOMY) if f.rule.id == "FILE06")
    edit("ranker", (r"count: 1", "count: 3"), (r'parameters \{\s+key: "intra_op_thread_count".*?\}\s*\}', ""))(models)
    assert "RES03" in ids(models)


def test_defects_around_tensorrt(releases, tmp_path):
    models = shutil.copytree(releases["tensorrt"] / "models", tmp_path / "repository")
    assert ids(models, Surroundings(4, Machine((), None, None), None)) == {"RES06"}
    assert ids(models, Surroundings(4, Machine(("sm89",), None, None), None)) == {"RES07"}
    plan = models / "ranker" / "1" / "sm86.plan"
    manifest = load_manifest(releases["tensorrt"])["engines"][0]
    for change in ({"flavour": "tensorrt_rtx"}, {"version": "9.0"}, {"plan": "0" * 64}):
        manifest_path(plan).write_text(json.dumps(manifest | change))
        assert ids(models) == {"RES08"}
    manifest_path(plan).unlink()
    edit("ranker", (r"model_warmup \{.*", ""))(models)
    assert ids(models) == {"RES04"}
    plan.unlink()
    assert "FILE04" in ids(models)


def test_shared_memory(releases):
    assert ids(releases["python"], Surroundings(4, ROOMY.machine, 1 << 16)) == {"RES02", "REL05"}


def test_timeouts_that_add_up(models):
    for stage in ("preprocess", "ranker", "rerank"):
        queue("default_timeout_microseconds: 40000", stage)(models)
    assert "QUEUE01" not in ids(models)
    tight = Surroundings(4, ROOMY.machine, None, deadline_ms=100)
    assert "QUEUE01" in ids(models, tight)
    assert "QUEUE01" not in ids(models, Surroundings(4, ROOMY.machine, None, deadline_ms=120))


def test_a_delay_is_held_to_the_deadline(models):
    edit("ranker", (r"dynamic_batching \{", "dynamic_batching { max_queue_delay_microseconds: 30000"))(models)
    assert "BATCH04" not in ids(models)
    assert "BATCH04" in ids(models, Surroundings(4, ROOMY.machine, None, deadline_ms=50))


# What Triton's own examples are made of, in few words: sums of two tensors, an identity, sequences, a string in and out,
# an image classifier with its preprocessing as an ensemble, a decoupled model, one without any configuration.
def tensor(kind, name, dims, type="FP32", more=""):
    return f'{kind} {{ name: "{name}" data_type: TYPE_{type} dims: {dims} {more} }}'


TWO_SUMS = [tensor("input", f"INPUT{i}", [16], "INT32") for i in (0, 1)] + [
    tensor("output", f"OUTPUT{i}", [16], "INT32") for i in (0, 1)
]
CONTROL = (
    'control_input { name: "START" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }'
    'control_input { name: "READY" control { kind: CONTROL_SEQUENCE_READY int32_false_true: [0, 1] } }'
)
STEP = 'step {{ model_name: "{}" model_version: -1 input_map {{ key: "{}" value: "{}" }} output_map {{ key: "{}" value: "{}" }} }}'
EXAMPLES = {
    "simple": ("model.onnx", ['platform: "onnxruntime_onnx" max_batch_size: 8', *TWO_SUMS]),
    "simple_string": ("model.graphdef", [
        'platform: "tensorflow_graphdef" max_batch_size: 8', tensor("input", "INPUT0", [16], "STRING"),
        tensor("output", "OUTPUT0", [16], "STRING"),
    ]),
    "simple_identity": ("model.savedmodel", [
        'platform: "tensorflow_savedmodel" max_batch_size: 8', tensor("input", "INPUT0", [-1], "STRING"),
        tensor("output", "OUTPUT0", [-1], "STRING"),
    ]),
    "sequence": ("libsequence.so", [
        'backend: "sequence" max_batch_size: 8 default_model_filename: "libsequence.so"',
        f"sequence_batching {{ max_sequence_idle_microseconds: 5000000 {CONTROL} }}",
        "instance_group { count: 2 kind: KIND_CPU }", tensor("input", "INPUT", [1], "INT32"),
        tensor("output", "OUTPUT", [1], "INT32"),
    ]),
    "dyna_sequence": ("libdyna.so", [
        'backend: "dyna" max_batch_size: 8 default_model_filename: "libdyna.so"',
        f"sequence_batching {{ oldest {{ max_candidate_sequences: 1024 max_queue_delay_microseconds: 10000 }} {CONTROL} }}",
        tensor("input", "INPUT", [1], "INT32"), tensor("output", "OUTPUT", [1], "INT32"),
    ]),
    "densenet": ("model.onnx", [
        'platform: "onnxruntime_onnx" max_batch_size: 1', tensor("input", "data_0", [3, 224, 224], more="format: FORMAT_NCHW"),
        tensor("output", "fc6_1", [1000], more='reshape { shape: [1000, 1, 1] } label_filename: "labels.txt"'),
    ]),
    "add_sub": ("model.py", [
        'backend: "python"', *[t.replace("INT32", "FP32").replace("16", "4") for t in TWO_SUMS],
        "instance_group { kind: KIND_CPU }",
    ]),
    "repeat": ("model.py", [
        'backend: "python" model_transaction_policy { decoupled: true }', tensor("input", "IN", [-1], "INT32"),
        tensor("output", "OUT", [1], "INT32"), "instance_group { count: 1 kind: KIND_CPU }",
    ]),
    "prompt_pipeline": ("model.py", [
        'backend: "python" max_batch_size: 8', tensor("input", "prompt", [1], "STRING"),
        tensor("output", "generated_image", [-1, -1, -1]), "instance_group { kind: KIND_GPU }",
    ]),
    "preprocess": ("model.py", [
        'backend: "python" max_batch_size: 256', tensor("input", "INPUT_0", [-1], "UINT8"),
        tensor("output", "OUTPUT_0", [3, 224, 224]), "instance_group { kind: KIND_CPU }",
    ]),
    "resnet50_trt": ("model.plan", [
        'platform: "tensorrt_plan" max_batch_size: 256', tensor("input", "input", [3, -1, -1]), tensor("output", "output", [1000]),
    ]),
    "ensemble_resnet50": (None, [
        'platform: "ensemble" max_batch_size: 256', tensor("input", "INPUT", [-1], "UINT8"), tensor("output", "OUTPUT", [1000]),
        "ensemble_scheduling {", STEP.format("preprocess", "INPUT_0", "INPUT", "OUTPUT_0", "image"),
        STEP.format("resnet50_trt", "input", "image", "output", "OUTPUT"), "}",
    ]),
    "image_ensemble": (None, [
        'platform: "ensemble" max_batch_size: 1', tensor("input", "INPUT", [1], "STRING"), tensor("output", "OUTPUT", [1000]),
        "ensemble_scheduling {", STEP.format("decode", "INPUT", "INPUT", "OUTPUT", "preprocessed_image"),
        STEP.format("inception", "input", "preprocessed_image", "InceptionV3/Softmax", "OUTPUT"), "}",
    ]),
    "decode": ("libdecode.so", [
        'backend: "image_preprocess" max_batch_size: 1 default_model_filename: "libdecode.so"',
        tensor("input", "INPUT", [1], "STRING"), tensor("output", "OUTPUT", [299, 299, 3]),
    ]),
    "inception": ("model.graphdef", [
        'platform: "tensorflow_graphdef" max_batch_size: 128', tensor("input", "input", [299, 299, 3], more="format: FORMAT_NHWC"),
        tensor("output", "InceptionV3/Softmax", [1001 - 1]), "instance_group { kind: KIND_GPU count: 4 }",
    ]),
    "completed_by_triton": ("model.onnx", None),
}  # fmt: skip


@pytest.fixture
def examples(tmp_path):
    folder = tmp_path / "examples"
    for name, (file, lines) in EXAMPLES.items():
        version = folder / name / "1"
        version.mkdir(parents=True)
        if lines is not None:
            (version.parent / "config.pbtxt").write_text("\n".join([f'name: "{name}"', *lines]))
        if file == "model.py":
            (version / file).write_text(
                "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"
            )
        elif file == "model.onnx":
            onnx.save(graph_of(name), version / file)
        elif file:
            (version / file).write_bytes(b"")
    return folder


def graph_of(name):
    """An ONNX graph with the inputs and outputs of an example."""
    make, types = onnx.helper.make_tensor_value_info, onnx.TensorProto
    if name == "densenet":
        given, taken = [make("data_0", types.FLOAT, [1, 3, 224, 224])], [make("fc6_1", types.FLOAT, [1, 1000, 1, 1])]
    else:
        given = [make(f"INPUT{i}", types.INT32, ["n", 16]) for i in (0, 1)]
        taken = [make(f"OUTPUT{i}", types.INT32, ["n", 16]) for i in (0, 1)]
    return onnx.helper.make_model(onnx.helper.make_graph([], name, given, taken))


def test_nothing_wrong_is_said_of_public_examples(examples):
    found = examine(examples, ROOMY)
    assert [f for f in found if f.rule.severity > Severity.INFO] == []
    # What remains is advice, and true: these take batches that only callers make, or run on a GPU without a warm-up.
    assert {(f.rule.id, f.where) for f in found} == {
        ("BATCH05", name)
        for name in (
            "simple",
            "simple_string",
            "simple_identity",
            "prompt_pipeline",
            "preprocess",
            "resnet50_trt",
            "inception",
        )
    } | {("RES04", "resnet50_trt")}


def test_ids_do_not_change_and_everything_is_said():
    seeded = {wanted for wanted, _ in DEFECTS.values()}
    seeded |= {
        "FILE06",
        "QUEUE01",
        "REL01",
        "REL02",
        "REL03",
        "REL04",
        "REL05",
        "REL06",
        *(f"RES0{n}" for n in (2, 3, 4, 6, 7, 8)),
    }
    live = {f"LIVE0{n}" for n in range(1, 9)}
    assert set(RULES) == seeded | live
    assert all(rule.what.endswith(".") and rule.fix.endswith(".") for rule in RULES.values())


def test_by_command(models, releases, tmp_path):
    run = CliRunner().invoke
    sound = run(app, ["doctor", str(releases["python"])])
    assert sound.exit_code == 0, sound.output
    assert "REL05" in sound.output
    edit("ranker", (r"max_batch_size: 32", "max_batch_size: 16"))(models)
    found = run(app, ["doctor", str(models), "--json"])
    assert found.exit_code == 1
    (finding,) = [f for f in json.loads(found.output)["findings"] if f["id"] == "ENS10"]
    assert (finding["severity"], finding["where"]) == ("error", "rank")
    assert "max_batch_size is 32, step ranker takes 16" in finding["reason"]
    table = run(app, ["doctor", str(models)]).output
    assert "ENS10" in table
    assert "Raise the step's max_batch_size" in " ".join(table.split())
    advice = shutil.copytree(releases["python"] / "models", tmp_path / "advice")
    edit("ranker", (r"dynamic_batching \{.*?\}", ""))(advice)
    assert run(app, ["doctor", str(advice)]).exit_code == 0
    assert run(app, ["doctor", str(advice), "--fail-on", "info"]).exit_code == 1
    gpu = ["doctor", str(releases["tensorrt"])]
    assert "RES06" in run(app, gpu).output
    assert run(app, [*gpu, "--elsewhere"]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["nowhere"], BadUsage, "neither a folder nor host:port"),
        (["127.0.0.1:1"], ServeError, "no Triton answers at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_examined(arguments, error, words):
    done = CliRunner().invoke(app, ["doctor", *arguments])
    assert isinstance(done.exception, error)
    assert words in str(done.exception)


def test_a_folder_without_models(tmp_path):
    with pytest.raises(BadModel, match="holds no model"):
        Repository.read(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BadModel, match="is no folder"):
        Repository.read(tmp_path / "file")


def test_serving_needs_no_torch():
    """A serving machine has neither torch nor onnx nor polars; what it imports must not want them."""
    heavy = "torch", "onnx", "polars", "lightgbm", "optuna", "scipy"
    code = (
        "import sys\nfor name in sys.argv[1:]: sys.modules[name] = None\n"
        "import trirank_build.cli, trirank_build.serving.following, trirank_build.repository.store\n"
        "import trirank_build.doctor.examine, trirank_build.engines.verify\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_versions_and_their_vulnerabilities():
    """As NVIDIA's bulletins have them: 25.07 was 2.59.1, and 2.59.0 lacks what it mended."""
    from trirank_build.doctor.vulnerabilities import of_version, published

    def cves(version):
        return {cve for each in of_version(version) for cve in each.cves}

    assert "CVE-2025-23310" in cves("2.51.0") & cves("2.59.0")
    assert "CVE-2025-23310" not in cves("2.59.1")
    assert "CVE-2024-0087" not in cves("2.51.0")
    assert cves("2.71.0") == set()
    everything = [cve for each in published() for cve in each.cves]
    assert len(everything) == len(set(everything))
    assert {each.closed_by for each in published()} == {
        "", "http", "logging", "model-repository", "shared-memory", "trace",
    }  # fmt: skip
