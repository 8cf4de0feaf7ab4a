"""The program `gridreg`: register two images, apply a transform, write it in another format, look into one."""

import argparse
import functools
import os
import shlex
import signal
import sys
import time
import warnings

from gridreg_jax import __version__
from gridreg_jax.doorway import fail, prepare_process
from gridreg_jax.errors import InputError, check_apart

TRANSFORM = ".tfm, .txt, .mat, .h5 or displacement .nii.gz"


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a user's mistake is one line on standard error, and exit status 2; Ctrl-C another, and 130."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leaving nothing half-written
    options = _parser().parse_args(arguments)
    # Numpy's matrix products are small here: its threads would only wait for each other. Read when numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        prepare_process()
        options.run(options)
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        fail(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gridreg", description="Medical image registration by sparse control grids.")
    parser.add_argument("--version", action="version", version=f"gridreg {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    command = commands.add_parser("register", help="register two images", description=_register.__doc__)
    command.add_argument("--fixed", required=True, metavar="FILE", help="NIfTI image whose lattice the result has")
    command.add_argument("--moving", required=True, metavar="FILE", help="NIfTI image that is warped")
    command.add_argument("--out", required=True, metavar="DIR", help="folder for the results")
    command.add_argument("--preset", default="balanced", metavar="NAME", help="fast, balanced (default) or accurate")
    command.add_argument("--affine", default="auto", metavar="HOW", help="auto (default), rigid, off, or a file")
    command.add_argument("--similarity", default="lncc", metavar="NAME", help="lncc (default), ncc, mse, nmi or mind")
    command.add_argument(
        "--grid", default="auto", metavar="SIZE", help="last control grid: points an axis (10), cells (5mm), or auto"
    )
    command.add_argument("--mask", metavar="FILE", help="on the fixed image's lattice: what is 0 there does not count")
    command.add_argument(
        "--method", default="grid", metavar="NAME", help="grid (default), velocity, symmetric, or ncf (a small network)"
    )
    command.add_argument("--model", metavar="WORKDIR", help="run of train.py whose network proposes the map")
    command.add_argument(
        "--refine", type=int, metavar="N", help="steps after the network (default: as the run's config says)"
    )
    command.add_argument("--fixed-labels", metavar="FILE", help="labels of the fixed image, for the Dice overlap")
    command.add_argument("--moving-labels", metavar="FILE", help="labels of the moving image, to be warped")
    command.add_argument("--fixed-points", metavar="CSV", help="points of the fixed image, RAS mm: id,x,y,z")
    command.add_argument("--moving-points", metavar="CSV", help="points of the moving image, RAS mm: id,x,y,z")
    more = dict(nargs="+", action="extend", default=[], metavar="FILE")
    command.add_argument("--also-apply", **more, help="images to warp in the same way")
    command.add_argument("--also-apply-labels", **more, help="labels to warp in the same way")
    command.add_argument("--learn2reg", action="store_true", help="also write the map as Learn2Reg reads it")
    command.set_defaults(run=_register)

    command = commands.add_parser("apply", help="apply a transform", description=_apply.__doc__)
    command.add_argument("--transform", required=True, metavar="FILE", help=TRANSFORM)
    what = command.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", metavar="FILE", help="image to warp, linear")
    what.add_argument("--labels", metavar="FILE", help="labels to warp, linear vote")
    what.add_argument("--points", metavar="CSV", help="points of the fixed image, RAS mm: id,x,y,z")
    command.add_argument("--reference", metavar="FILE", help="image whose lattice the result has (not for points)")
    command.add_argument("--out", required=True, metavar="FILE", help="the result")
    command.set_defaults(run=_apply)

    command = commands.add_parser("convert", help="write a transform in another format", description=_convert.__doc__)
    command.add_argument("transform", metavar="FILE", help=TRANSFORM)
    command.add_argument("--out", required=True, metavar="FILE", help=f"the result: {TRANSFORM}")
    command.add_argument("--inverse", action="store_true", help="write what leads back")
    command.add_argument(
        "--reference",
        metavar="FILE",
        help="image whose lattice a displacement has; of an inverse, the moving image that the transform is for",
    )
    command.set_defaults(run=_convert)

    command = commands.add_parser("inspect", help="look into a transform", description=_inspect.__doc__)
    command.add_argument("transform", metavar="FILE", help=TRANSFORM)
    command.add_argument("--image", metavar="FILE", help="fixed image that the transform is for")
    command.set_defaults(run=_inspect)
    return parser


def _register(options: argparse.Namespace) -> None:
    """Register two images and write the results: warped image, transforms, displacements, metrics.json, report.html."""
    from concurrent.futures import ThreadPoolExecutor
    from pathlib import Path

    from tqdm import tqdm

    from gridreg_jax.data import nifti
    from gridreg_jax.registration.deformable import PRESETS
    from gridreg_jax.registration.register import register
    from gridreg_jax.registration.results import check_inputs, filling, load_points, save

    start = time.monotonic()
    if not options.out:
        raise InputError("--out is empty: give a folder")
    if options.fixed_labels and not options.moving_labels:
        raise InputError("--fixed-labels are for the Dice overlap and need --moving-labels")

    def load(which):
        image, path = nifti.load_image(getattr(options, which), placed=True), getattr(options, f"{which}_labels")
        return image, nifti.load_labels(path, like=image) if path else None

    with ThreadPoolExecutor(2) as pool:
        (fixed, fixed_labels), (moving, moving_labels) = pool.map(load, ("fixed", "moving"))
        load_other = functools.partial(nifti.load_image, placed=True, constant=True)
        also_apply = [*pool.map(load_other, options.also_apply)]
        also_apply += pool.map(functools.partial(nifti.load_labels, placed=True), options.also_apply_labels)
    points = options.fixed_points, options.moving_points
    inputs = (options.fixed, options.moving, options.mask, options.affine, options.fixed_labels, options.moving_labels)
    inputs = [*filter(None, inputs + points), *options.also_apply, *options.also_apply_labels]
    check_inputs(options.out, inputs, [*also_apply, *([moving_labels] if moving_labels else [])], *points)
    load_points(fixed, moving, *points)
    with filling(Path(options.out)):
        pass  # Where nothing can be written, that is said before the long part.

    with tqdm(total=len(PRESETS.get(options.preset, PRESETS["fast"]).stages), disable=not sys.stderr.isatty()) as bar:

        def notify(stage):
            size, values = "x".join(map(str, stage.grid_size)), [f"{value:.3f}" for value in stage.similarity]
            bar.total = bar.n + 1 + stage.remaining  # A network leaves fewer of them.
            bar.set_description(f"grid {size}: {options.similarity} {' to '.join(values[:1] + values[1:][-1:])}")
            bar.update()

        registration = register(
            fixed,
            moving,
            preset=options.preset,
            affine=options.affine,
            similarity=options.similarity,
            grid=_grid(options.grid),
            mask=options.mask,
            method=options.method,
            model=options.model,
            refine=options.refine,
            notify=notify,
        )
    metrics = save(
        registration,
        options.out,
        fixed_labels=fixed_labels,
        moving_labels=moving_labels,
        fixed_points=options.fixed_points,
        moving_points=options.moving_points,
        also_apply=also_apply,
        learn2reg=options.learn2reg,
        command=shlex.join(["gridreg", *sys.argv[1:]]),
    )
    print(f"correlation {_course(metrics['correlation'])}; {registration.certificate}")
    if "dice" in metrics:
        print(f"mean Dice {_course({when: part['mean'] for when, part in metrics['dice'].items()})}")
    if "tre_mm" in metrics:
        print(f"points {_course(metrics['tre_mm'], digits=2)} mm apart")
    if not registration.certificate.invertible:
        print("warning: the map is not proven to be invertible; coarser cells (--grid) help", file=sys.stderr)
    print(f"written to {options.out} in {time.monotonic() - start:.1f} s; see {options.out}/report.html")


def _course(numbers: dict, digits: int = 3) -> str:
    words = {"before": "before", "affine": "after the affine part", "after": "after all"}
    values = {when: "none" if numbers[when] is None else f"{numbers[when]:.{digits}f}" for when in words}
    return ", ".join(f"{values[when]} {text}" for when, text in words.items())


def _grid(text: str) -> int | float | None:
    if text == "auto":
        return None
    try:
        return float(text.removesuffix("mm")) if text.endswith("mm") else int(text)
    except ValueError:
        raise InputError(f"--grid={text}: give points an axis (10), a length of cells (5mm), or auto") from None


def _apply(options: argparse.Namespace) -> None:
    """Warp an image or labels in the moving image's space onto the lattice of a reference, or map points to there."""
    from pathlib import Path

    import numpy as np

    from gridreg_jax.data import nifti
    from gridreg_jax.export import itk, itk_files
    from gridreg_jax.registration.register import pull
    from gridreg_jax.registration.results import write_points

    if options.points and not options.out.lower().endswith(".csv"):
        raise InputError(f"{options.out}: points are written as .csv")
    inputs = (options.transform, options.image, options.labels, options.points, options.reference)
    check_apart([options.out], filter(None, inputs), "another --out")
    transforms = itk_files.read(options.transform)
    if options.points:
        points = nifti.load_landmarks(options.points)
        mapped = itk.apply(transforms, np.array(list(points.values())))
        write_points(Path(options.out), dict(zip(points, mapped, strict=True)))
        return
    if not options.reference:
        raise InputError("--reference is missing: the image whose lattice the result has")
    reference = nifti.load_lattice(options.reference)
    nifti.check_right_angles(reference)
    if options.labels:
        volume = nifti.load_labels(options.labels, placed=True)
    else:
        volume = nifti.load_image(options.image, placed=True, constant=True)
    displacement = itk.displacement(transforms, reference.array.shape, reference.affine)
    matrix = np.linalg.inv(volume.affine) @ reference.affine
    warped = pull(volume, displacement, matrix, labels=bool(options.labels))
    nifti.save(options.out, *nifti.as_stored(warped, reference))


def _convert(options: argparse.Namespace) -> None:
    """Write a transform or its inverse in the format that the name of the result ends in."""
    import numpy as np

    from gridreg_jax.data import nifti
    from gridreg_jax.export import itk, itk_files
    from gridreg_jax.export.inverse import invert

    dense = (".nii", ".nii.gz")
    itk_files.check_suffix(options.out, *dense)
    check_apart([options.out], filter(None, (options.transform, options.reference)), "another --out")
    transforms = itk_files.read(options.transform)
    search = options.inverse and any(transform.type != itk.AFFINE for transform in transforms)
    if search or options.out.endswith(dense):
        if not options.reference:
            side = ", in the moving image's space" if options.inverse else ""
            raise InputError(f"--reference is missing: the image whose lattice the displacement has{side}")
        reference = nifti.load_lattice(options.reference)
        nifti.check_right_angles(reference)
        shape, affine = reference.array.shape, reference.affine
    if search:
        inverse, errors = invert(transforms, shape, affine)
        transforms = [inverse]
        print(errors)
        for warning in errors.warnings():
            print(f"warning: {warning}", file=sys.stderr)
    elif options.inverse:
        transforms = [itk.affine_transform(np.linalg.inv(itk.affine_matrix(transforms)))]
    if not options.out.endswith(dense):
        itk_files.write(options.out, transforms)
        return
    displacement_mm = itk.displacement(transforms, shape, affine) @ affine[:3, :3].T.astype(np.float32)
    itk_files.save_displacement(options.out, *nifti.as_stored(displacement_mm, reference))


def _inspect(options: argparse.Namespace) -> None:
    """Say what a transform is, where it acts, how it stretches space, and whether it is proven to be invertible."""
    from gridreg_jax.registration.inspection import inspect

    for line in inspect(options.transform, options.image):
        print(line)
