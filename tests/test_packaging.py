"""Wheel, sdist, editable install and checkout import one package, whatever else is installed.

Everything is built from a copy of the checkout and needs no network: environments see the packages
of the running one through a folder of links, from which a test leaves out what must be missing.
"""

import email
import email.message
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(
    ".git", ".venv", "venv", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
)

# Hugging Face's kernels as far as transformers imports it: every name is there and does nothing.
FAKE_KERNELS = """
class _Lenient(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls()


class _Anything(metaclass=_Lenient):
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, wrapped=None, *args, **kwargs):
        return wrapped

    def __or__(self, other):
        return self


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything
"""

IMPORT = """
import atman_triton, atman_triton.kernels.reference as reference
print(atman_triton.__version__, atman_triton.__file__, reference.__file__, sep="\\n")
"""

EXPLAIN = """
import importlib.util, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.import_utils import is_kernels_available
import atman_triton as atman, atman_triton.kernels.reference as reference

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=40, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
)).eval()
result = atman.Explainer(model, None, progress=False).explain([5, 6, 7, 8, 9], target=[10, 11])
assert result.scores.shape[0] == 2 and result.relevance.abs().max() > 1e-4, result.scores
print(reference.__file__, is_kernels_available(), sep="\\n")
# torch imports triton where it can; our kernels wait until they are asked for.
print("atman_triton.kernels.forward" in sys.modules, importlib.util.find_spec("triton") is not None)
"""


def run(command: list[str], cwd: Path, **environment: str) -> list[str]:
    """Lines of the command's standard output; its error output is shown when it fails."""
    ours = ("PYTHON", "PYTEST", "TRITON")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    clean.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, **environment)
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout.splitlines()


class Environment:
    """A virtual environment with the running one's packages, minus some."""

    def __init__(self, folder: Path, without: tuple[str, ...] = ()) -> None:
        links = folder / "links"
        links.mkdir(parents=True)
        hidden = ("atman_triton", "kernels", "__editable__", *without)
        # Ours first, so that an outer environment never hides a package of the running one.
        for entry in (Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))):
            for item in entry.iterdir() if entry.is_dir() else ():
                name = item.name.split("-")[0].split(".")[0]
                link = links / item.name
                if name not in hidden and item.suffix != ".pth" and not os.path.lexists(link):
                    link.symlink_to(item)
        venv.create(folder / "venv", with_pip=False)
        self.python = str(folder / "venv" / "bin" / "python")
        paths = sysconfig.get_paths("venv", {"base": str(folder / "venv")})
        self.site, self.scripts = Path(paths["purelib"]), Path(paths["scripts"])
        (self.site / "links.pth").write_text(f"{links}\n")

    def install(self, *what: str) -> None:
        """Install with pip, without a network."""
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
        command = [self.python, "-m", "pip", "--disable-pip-version-check", "install", *options]
        run([*command, *what], cwd=self.site)

    def add_fake_kernels(self) -> None:
        """Put a package into the environment that passes for Hugging Face's `kernels`."""
        from transformers.utils.import_utils import KERNELS_MIN_VERSION

        info = self.site / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n"
        (info / "METADATA").write_text(metadata)
        (self.site / "kernels").mkdir()
        (self.site / "kernels" / "__init__.py").write_text(FAKE_KERNELS)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, so that building leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("checkout") / "atman_triton"
    shutil.copytree(ROOT, copy, symlinks=True, ignore=NOT_COPIED)
    return copy


def build(source: Path, kind: str, out: Path) -> Path:
    """Build a "wheel" or an "sdist" of ``source`` with the running environment's setuptools."""
    program = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    run([sys.executable, "-c", program], cwd=source)
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as built from the checkout."""
    return build(checkout, "wheel", tmp_path_factory.mktemp("wheel"))


def package_files() -> Iterator[str]:
    """Every file of the package as an installed path, from what stands in the checkout."""
    for folder, installed in (
        ("atman_triton", "atman_triton"),
        ("kernels", "atman_triton/kernels"),
    ):
        for path in (ROOT / folder).rglob("*"):
            relative = path.relative_to(ROOT / folder)
            if (
                path.is_file()
                and relative.parts[0] != "kernels"
                and "__pycache__" not in path.parts
            ):
                yield f"{installed}/{relative.as_posix()}"


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.split("/")[0] for name in names if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        scripts = archive.read(f"{info}/entry_points.txt").decode()
    package = {name for name in names if not name.startswith(info)}
    assert package == set(package_files())
    assert "atman_triton/kernels/reference.py" in package
    assert "atman = atman_triton.cli:main" in scripts
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in names


def test_requirements_are_wide_and_triton_is_for_linux_only(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        required = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist") or []
    (triton,) = (line for line in required if line.startswith("triton"))
    assert 'sys_platform == "linux"' in triton
    assert not [line for line in required if "==" in line.split(";")[0]]


def test_constraints_pin_every_direct_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    extras = [name for group in project["optional-dependencies"].values() for name in group]
    direct = {line.split(" ")[0].split("[")[0].lower() for line in project["dependencies"] + extras}
    assert direct - {"atman_triton"} <= pinned


def test_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "sdist").mkdir()
    (tmp_path / "wheel").mkdir()
    with tarfile.open(build(checkout, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("atman_triton-*")
    again = build(unpacked, "wheel", tmp_path / "wheel")
    with zipfile.ZipFile(wheel) as first, zipfile.ZipFile(again) as second:
        assert {i.filename: i.CRC for i in first.infolist() if "RECORD" not in i.filename} == {
            i.filename: i.CRC for i in second.infolist() if "RECORD" not in i.filename
        }


def test_wheel_explains_on_cpu_without_triton(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path, without=("triton",))
    environment.install(str(wheel))
    lines = run([environment.python, "-c", EXPLAIN], cwd=tmp_path)
    assert Path(lines[0]) == environment.site / "atman_triton" / "kernels" / "reference.py"
    assert lines[1:] == ["False", "False False"]
    assert "explain" in " ".join(run([str(environment.scripts / "atman"), "--help"], tmp_path))


def test_wheel_explains_beside_triton_and_hugging_face_kernels(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.install(str(wheel))
    environment.add_fake_kernels()
    program = EXPLAIN + "import kernels; print(kernels.__file__)"
    lines = run([environment.python, "-c", program], cwd=tmp_path)
    assert Path(lines[0]) == environment.site / "atman_triton" / "kernels" / "reference.py"
    assert lines[1:3] == ["True", "False True"]
    assert Path(lines[-1]) == environment.site / "kernels" / "__init__.py"


def test_editable_install_imports_the_checkout(checkout: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.install("--editable", str(checkout))
    lines = run([environment.python, "-c", IMPORT], cwd=tmp_path)
    assert Path(lines[1]) == checkout / "atman_triton" / "__init__.py"
    assert Path(lines[2]).resolve() == checkout / "kernels" / "reference.py"


def test_pytest_runs_from_the_root_of_a_checkout(checkout: Path, tmp_path: Path) -> None:
    """Where nothing of it is installed, and Hugging Face's kernels are."""
    environment = Environment(tmp_path)
    environment.add_fake_kernels()
    test = textwrap.dedent(f"""
        from pathlib import Path

        import atman_triton.kernels.reference as reference
        from transformers import LlamaForCausalLM
        from transformers.utils.import_utils import is_kernels_available


        def test_checkout():
            expected = Path({str(checkout)!r}) / "kernels" / "reference.py"
            assert Path(reference.__file__).resolve() == expected
            assert is_kernels_available()
    """)
    (tmp_path / "test_checkout.py").write_text(test)
    command = [environment.python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    lines = run(
        [*command, "--rootdir", ".", "-c", "pyproject.toml", f"{tmp_path}/test_checkout.py"],
        checkout,
    )
    assert "1 passed" in lines[-1]
