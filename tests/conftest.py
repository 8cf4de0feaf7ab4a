"""What every test runs under: two virtual CPU devices, caches of its own, and checked array shapes and types.

The environment is set here, before anything imports JAX, and child processes inherit it.
"""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

# Programs here are tiny: compiling them takes longer than running them, so XLA need not optimise them.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0")
CACHE = Path(tempfile.mkdtemp(prefix="gridreg-test-cache-"))
os.environ["GRIDREG_CACHE"] = str(CACHE)
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

if importlib.util.find_spec("beartype"):
    import jaxtyping

    jaxtyping.install_import_hook("gridreg_jax", "beartype.beartype")


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture
def program_cache(tmp_path):
    """An empty folder that JAX keeps its programs in."""
    import jax

    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs_of_jax"))
    yield tmp_path / "programs_of_jax"
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def real_data() -> Path:
    """Folder of real images, named by $GRIDREG_TEST_DATA."""
    root = os.environ.get("GRIDREG_TEST_DATA")
    if not root:
        pytest.skip("GRIDREG_TEST_DATA names no folder of images")
    return Path(root)


@pytest.fixture(scope="session")
def write_nifti():
    """`write_nifti(path, array, affine=None)` stores an array (voxels of 1 mm by default) and returns the path."""

    def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
        return path

    return write


@pytest.fixture(scope="session")
def subjects_csv(tmp_path_factory, write_nifti) -> Path:
    """List of eight subjects, 4 train, 2 val and 2 test: two smooth blobs each, labels 3 and 7, 16 x 20 x 16 mm.

    Two subjects are stored in other axis orders than RAS. Landmarks 1 and 2 are the centres of the blobs.
    """
    folder = tmp_path_factory.mktemp("subjects")
    rows = ["image,labels,landmarks,split"]
    grid = np.stack(np.meshgrid(*map(np.arange, (16, 20, 16)), indexing="ij"), -1)
    for index, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2):
        rng = np.random.default_rng(index)
        centers = np.array([[5.0, 6, 7], [10, 13, 8]]) + rng.uniform(-1, 1, (2, 3))
        squared = [((grid - center) ** 2).sum(-1) for center in centers]
        array = sum(np.exp(-distance / 18) for distance in squared) + 0.01 * rng.normal(size=grid.shape[:3])
        labels = np.select([distance < 12 for distance in squared], [3, 7])
        codes = {2: "LPS", 6: "PIR"}.get(index, "RAS")
        orientation = nib.orientations.axcodes2ornt(codes)
        for name, values in (("image", array.astype(np.float32)), ("labels", labels.astype(np.int16))):
            stored = nib.Nifti1Image(values, np.eye(4)).as_reoriented(orientation)
            write_nifti(folder / f"{name}{index}.nii.gz", np.asanyarray(stored.dataobj), stored.affine)
        points = [f"{number},{x:.4f},{y:.4f},{z:.4f}" for number, (x, y, z) in enumerate(centers, start=1)]
        (folder / f"points{index}.csv").write_text("\n".join(["id,x,y,z", *points]) + "\n")
        rows.append(f"image{index}.nii.gz,labels{index}.nii.gz,points{index}.csv,{split}")
    path = folder / "subjects.csv"
    path.write_text("\n".join(rows) + "\n")
    return path
