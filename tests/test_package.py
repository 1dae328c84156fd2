"""The package as a whole: what importing costs, and which way imports point."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "timm", "torchvision", "torchrec", "lightning", "triton", "numpy")
# A module may import from its own layer and from the layers after it.
LAYERS = ("tasks", "zoo.models", "zoo.pretrained", "zoo.parallel", "zoo.moe")


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_zoo_loads_nothing_heavy() -> None:
    loaded = run_python(f"import zoo, sys; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_names_that_are_imported_late_are_listed() -> None:
    listed = run_python("import zoo; print(set(zoo.__all__) <= set(dir(zoo)))")
    assert listed.strip() == "True"


def test_a_library_that_must_not_be_imported_is_not() -> None:
    """None in sys.modules, as tests of other packages put it there."""
    blocked = "import sys; sys.modules.update(timm=None, transformers=None); import zoo, zoo.moe"
    run_python(
        f"{blocked}; sys.modules['transformers.integrations.moe'] = None; import importlib; importlib.reload(zoo)"
    )


def test_the_core_needs_torch_alone() -> None:
    others = [m for m in HEAVY if m not in ("torch", "numpy", "triton")]
    loaded = run_python(f"import zoo.moe, sys; print([m for m in {others!r} if m in sys.modules])")
    assert loaded.strip() == "[]"


def test_asking_whether_timm_is_there_does_not_keep_our_models_from_it() -> None:
    asking = (
        "import zoo, importlib.util; assert importlib.util.find_spec('timm'); assert importlib.util.find_spec('timm')"
    )
    found = run_python(f"{asking}; import timm; print(timm.is_model('vmoe_tiny_test'), len(timm.list_models('vmoe*')))")
    known, count = found.split()
    assert known == "True"
    assert int(count) > 3


@pytest.mark.parametrize(
    ("library", "call", "extra"),
    [
        ("timm", "zoo.create_model('vision/vmoe_tiny_test')", "vision"),
        ("transformers", "zoo.create_model('language/mixtral_tiny')", "language"),
        ("timm", "zoo.from_pretrained(folder)", "vision"),
        ("transformers", "zoo.save_pretrained(__import__('torch').nn.Linear(2, 2), folder + '/new')", "language"),
    ],
)
def test_a_missing_library_says_which_extra_has_it(library: str, call: str, extra: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    code = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {library!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import zoo
folder = {str(tmp_path)!r}
try:
    {call}
except ImportError as error:
    print(error)
"""
    assert f"{library} is not installed; it comes with the extra: pip install 'moe-zoo[{extra}]'" in run_python(code)


def test_the_extras_are_those_of_the_project() -> None:
    from zoo.extras import EXTRAS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    distributions = {"sklearn": "scikit-learn", "fbgemm_gpu": "fbgemm-gpu-cpu"}
    for library, extra in EXTRAS.items():
        names = [re.split(r"[<>=\[]", line)[0] for line in project[extra]]
        assert distributions.get(library, library) in names


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    import zoo

    with pytest.raises(AttributeError, match="no attribute 'creat_model'"):
        zoo.creat_model  # noqa: B018


def imported_modules(path: Path) -> set[str]:
    """Absolute names of everything a file imports, at any depth."""
    package = path.relative_to(ROOT).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def layer_of(module: str) -> int | None:
    for rank, layer in enumerate(LAYERS):
        if module == layer or module.startswith(layer + "."):
            return rank
    return None


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer: str) -> None:
    rank = LAYERS.index(layer)
    for path in (ROOT / layer.replace(".", "/")).rglob("*.py"):
        for module in imported_modules(path):
            target = layer_of(module)
            assert target is None or target >= rank, f"{path.relative_to(ROOT)} imports {module}, a layer above"


def test_the_kernels_import_nothing_of_ours() -> None:
    for path in (ROOT / "zoo/moe/kernels").rglob("*.py"):
        ours = {m for m in imported_modules(path) if m.startswith(("zoo", "tasks"))}
        assert all(m.startswith("zoo.moe.kernels") for m in ours), f"{path.relative_to(ROOT)} imports {ours}"


def test_pins_are_complete_and_name_no_address() -> None:
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in line and "://" not in line for line in pins)


def test_the_pinned_versions_load_together() -> None:
    """torchrec and torchvision carry compiled operators that break when torch is another version's."""
    operators = "torch.ops.torchvision.nms, torch.ops.fbgemm.jagged_to_padded_dense"
    assert "nms" in run_python(f"import torchvision, torchrec, timm, torch; print({operators})")


PAGES = [ROOT / "README.md", *(page for top in ("zoo", "configs") for page in (ROOT / top).rglob("README.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for script in set(re.findall(r"scripts/\w+\.py", text)):
        assert (ROOT / script).exists(), script
    for config in set(re.findall(r"[\w./]+\.yaml", text)):
        assert (ROOT / config).exists() or (page.parent / config).exists(), config


@pytest.mark.parametrize("folder", ["language", "vision", "vision_language", "recommendation"])
def test_the_page_of_a_domain_names_its_configs(folder: str) -> None:
    text = (ROOT / "configs" / folder / "README.md").read_text()
    for config in (ROOT / "configs" / folder).glob("*.yaml"):
        numbered = re.sub(r"_\d(?=\.yaml)", "_1", config.name)  # stages are named by their first
        assert f"`{config.name}`" in text or f"`{numbered}` to `_3`" in text, config.name


def test_files_that_are_not_python_go_into_the_wheel() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    found = {path.resolve() for top in data for pattern in data[top] for path in (ROOT / top).glob(pattern)}
    assert found == {*ROOT.glob("configs/*/*.yaml"), ROOT / "zoo" / "py.typed"}
