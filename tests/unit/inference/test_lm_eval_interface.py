"""What the kit calls of lm-eval exists there with these parameters, and the tests' stand-in has no others."""

import ast
from pathlib import Path

import tests.support.standin_packages as standins
from mixtral_run import inference

SIGNATURES = {
    "evaluator.simple_evaluate": (
        "model", "model_args", "tasks", "num_fewshot", "batch_size", "max_batch_size", "device", "use_cache",
        "cache_requests", "rewrite_requests_cache", "delete_requests_cache", "limit", "samples", "bootstrap_iters",
        "check_integrity", "write_out", "log_samples", "evaluation_tracker", "system_instruction",
        "apply_chat_template", "fewshot_as_multiturn", "gen_kwargs", "task_manager", "verbosity", "predict_only",
        "random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed", "confirm_run_unsafe_code",
        "metadata",
    ),
    "tasks.TaskManager.__init__": ("self", "verbosity", "include_path", "include_defaults", "metadata"),
    "tasks.TaskManager.all_tasks": ("self",),
    "utils.get_rolling_token_windows": ("token_list", "prefix_token", "max_seq_len", "context_len"),
    "utils.make_disjoint_window": ("pair",),
    "api.model.LM.loglikelihood": ("self", "requests"),
    "api.model.LM.loglikelihood_rolling": ("self", "requests"),
    "api.model.LM.generate_until": ("self", "requests"),
    "api.model.TemplateLM.eot_token_id": ("self",),
    "api.model.TemplateLM.prefix_token_id": ("self",),
    "api.model.TemplateLM.tok_encode": ("self", "string", "add_special_tokens", "kwargs"),
    "api.model.TemplateLM._loglikelihood_tokens": ("self", "requests", "kwargs"),
    "api.model.TemplateLM.loglikelihood": ("self", "requests", "disable_tqdm"),
}  # fmt: skip
"""Parameters in lm_eval 0.4.13, read from its source."""
STANDIN = Path(standins.__file__).parent / "lm_eval"
HARNESS = ast.parse((Path(inference.__file__).parent / "evaluation/harness.py").read_text())


def parameters(package: Path) -> dict[str, tuple[str, ...]]:
    """The parameters of all functions of a package, by module and name."""
    found = {}
    for file in package.rglob("*.py"):
        module = ".".join(file.relative_to(package).with_suffix("").parts)
        module = {"tasks.manager": "tasks"}.get(module, module)
        for node in ast.parse(file.read_text()).body:
            inner = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{module}.{node.name}" if isinstance(node, ast.ClassDef) else module
            for each in inner:
                if isinstance(each, ast.FunctionDef):
                    words = each.args
                    more = [word for word in (words.vararg, words.kwarg) if word is not None]
                    names = tuple(word.arg for word in (*words.posonlyargs, *words.args, *words.kwonlyargs, *more))
                    found[f"{prefix}.{each.name}"] = names
    return found


def test_the_stand_in_has_what_the_real_package_has() -> None:
    found = parameters(STANDIN)
    for name, words in SIGNATURES.items():
        assert set(found[name]) <= set(words), name
        kept = [word for word in words if word in found[name]]
        assert name == "evaluator.simple_evaluate" or kept == list(found[name]), name


def test_the_kit_calls_what_there_is() -> None:
    calls = {
        node.func.id: {word.arg for word in node.keywords}
        for node in ast.walk(HARNESS)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    for name in ("evaluator.simple_evaluate", "utils.get_rolling_token_windows"):
        assert calls[name.rpartition(".")[2]] <= set(SIGNATURES[name])
    assert calls["TaskManager"] <= set(SIGNATURES["tasks.TaskManager.__init__"])
    (model,) = [node for node in HARNESS.body if isinstance(node, ast.ClassDef)]
    defined = {
        node.name: [word.arg for word in node.args.args] for node in model.body if isinstance(node, ast.FunctionDef)
    }
    for name in ("tok_encode", "_loglikelihood_tokens", "eot_token_id", "prefix_token_id"):
        wanted = [word for word in SIGNATURES[f"api.model.TemplateLM.{name}"] if word != "kwargs"]
        assert defined[name] == wanted, name
    for name in ("loglikelihood_rolling", "generate_until"):
        assert defined[name][:2] == list(SIGNATURES[f"api.model.LM.{name}"]), name
