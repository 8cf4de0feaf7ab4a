"""A page that shows a registration, in one file: pictures, curves and numbers, no library and no network needed."""

import base64
import html
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, UInt8

from gridreg_jax import geometry
from gridreg_jax.registration.register import Registration

# Name of a plane, the axis across it, and the axes shown to the right and upwards.
PLANES = (("axial", 2, (0, 1)), ("coronal", 1, (0, 2)), ("sagittal", 0, (1, 2)))
# Longest side of a picture in the table, and in the comparison (pixels).
SMALL, LARGE = 190.0, 380.0
COLORS = ("#4477aa", "#ee6677", "#228833", "#aa3377", "#66ccee", "#ccbb44")
# Fields of a checkerboard along the longest side.
FIELDS = 8

_HEAD = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>%s</title><style>
body { font-family: sans-serif; margin: 2em; color: #222 }
th { text-align: left; font-weight: normal; padding-right: 1em; vertical-align: top }
pre { background: #eee; padding: 0.5em; white-space: pre-wrap; overflow-wrap: anywhere }
.pair { display: inline-block; position: relative; background: black; margin-right: 8px }
.pair img { display: block } .pair img[hidden] { display: none } .pair img + img { position: absolute; top: 0; left: 0 }
.moving { clip-path: inset(0 0 0 var(--cut)) } body { --cut: 50%% }
.line { position: absolute; top: 0; bottom: 0; left: var(--cut); border-left: 1px solid #fc0 }
#slider { width: 30em; max-width: 100%% }
</style></head><body>
"""
_SCRIPT = """<script>
const slider = document.getElementById("slider"), which = document.getElementById("which");
function show() {
  document.body.style.setProperty("--cut", slider.value + "%");
  for (const image of document.querySelectorAll(".moving")) image.hidden = image.dataset.name !== which.value;
}
slider.addEventListener("input", show);
which.addEventListener("change", show);
show();
</script>
"""


def page(registration: Registration, metrics: dict, volumes: dict[str, Float[np.ndarray, "x y z"]]) -> str:
    """The page as HTML.

    Args:
      registration: for the title, the grid, the curve and the spacing.
      metrics: the content of `metrics.json`.
      volumes: on one lattice from corner to corner of the fixed image, of any number of voxels each: "fixed"; the
        moving image "before" (by the headers), after the "affine" part and "after" all; "determinant"; or else also
        "sigma_mm".
    """
    title = html.escape(f"{registration.moving.path.name} to {registration.fixed.path.name}")
    return "".join(
        [
            _HEAD % title,
            f"<h1>{title}</h1>\n<pre>{html.escape(metrics['command'])}</pre>\n",
            *_comparison(registration, volumes),
            *_table(registration, volumes),
            "<h2>Similarity by step (lower is more alike)</h2>\n",
            _curve(registration),
            *_numbers(metrics),
            _SCRIPT,
            "</body></html>\n",
        ]
    )


def _comparison(registration: Registration, volumes: dict) -> Iterator[str]:
    """The middle planes of the fixed image, and of the moving image to the right of a line that a slider moves."""
    yield '<p><input type="range" id="slider" min="0" max="100" value="50"> left: fixed image, right: moving image '
    yield '<select id="which"><option value="after">result</option><option value="affine">affine part</option>'
    yield '<option value="before">by the headers</option></select></p>\n<div>'
    for _, across, shown in PLANES:
        size = _size(registration, shown, LARGE)
        yield f'<div class="pair">{_image(_gray(_cut(volumes["fixed"], across)), size)}'
        for name in ("after", "affine", "before"):
            hidden = "" if name == "after" else " hidden"
            yield _image(_gray(_cut(volumes[name], across)), size, f' class="moving" data-name="{name}"{hidden}')
        yield '<div class="line"></div></div>'
    yield "</div>\n"


def _table(registration: Registration, volumes: dict) -> Iterator[str]:
    """Overlays, a checkerboard and maps of the deformation, a row for each plane."""
    yield "<h2>Fixed image in red, moving image in cyan: grey where they agree</h2>\n<table><tr>"
    heads = ["", "by headers", "affine", "result", "checkerboard", "Jacobian: red 0, white 1, blue 2", "deformed grid"]
    if sigma := "sigma_mm" in volumes:
        highest = float(volumes["sigma_mm"].max())
        heads.append(f"uncertainty, 0 to {highest:.2g} mm")
    yield "".join(f"<th>{head}</th>" for head in heads) + "</tr>\n"
    for plane, across, shown in PLANES:
        size = _size(registration, shown, SMALL)
        fixed, after = (_cut(volumes[name], across) for name in ("fixed", "after"))
        pictures = []
        for name in ("before", "affine", "after"):
            other = _cut(volumes[name], across)
            pictures.append(_png(np.stack([fixed, other, other], axis=-1)))
        rows, columns = (np.arange(n) * FIELDS // max(fixed.shape) for n in fixed.shape)
        pictures.append(_gray(np.where((rows[:, None] + columns) % 2 == 0, fixed, after)))
        # From red (nothing is left of a voxel) over white to blue (twice its size).
        distance = np.clip(_cut(volumes["determinant"], across) - 1, -1, 1)[..., None]
        pictures.append(_png(1 - np.abs(distance) * np.where(distance < 0, [0.2, 0.9, 0.9], [0.9, 0.7, 0.1])))
        cells = [_image(picture, size) for picture in pictures] + [_grid(registration, across, shown, size)]
        if sigma:
            cells.append(_image(_gray(_cut(volumes["sigma_mm"], across) / (highest or 1.0)), size))
        yield f"<tr><th>{plane}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>\n"
    yield "</table>\n"


def _numbers(metrics: dict) -> Iterator[str]:
    yield "<h2>Numbers</h2><table>\n"
    shown = {name: value for name, value in metrics.items() if name not in ("command", "stages", "affine", "dice")}
    shown["certificate"] = metrics["certificate"]["text"]  # Its bound is rounded down.
    shown |= {f"dice {name}": part["mean"] for name, part in metrics.get("dice", {}).items()}
    for name, value in shown.items():
        yield f"<tr><th>{name}</th><td>{html.escape(_text(value))}</td></tr>\n"
    yield "</table>\n"


def _text(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else "none" if value is None else str(value)


def _cut(volume: Float[np.ndarray, "x y z"], across: int) -> Float[np.ndarray, "h w"]:
    """The middle plane, as a picture: its second axis upwards."""
    return np.take(volume, volume.shape[across] // 2, axis=across).T[::-1]


def _size(registration: Registration, shown: tuple[int, int], longest: float) -> tuple[float, float]:
    """Width and height of a picture, in the proportions of the fixed image in mm."""
    fixed = registration.fixed
    sides = (np.subtract(fixed.array.shape, 1) * geometry.spacing(fixed.affine))[list(shown)]
    return tuple(np.maximum(1, sides / sides.max() * longest))


def _image(png: bytes, size: tuple[float, float], attributes: str = "") -> str:
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" width="{size[0]:.0f}" height="{size[1]:.0f}" alt=""{attributes}>'


def _gray(plane: Float[np.ndarray, "h w"]) -> bytes:
    return _png(np.repeat(plane[..., None], 3, axis=-1))


def _png(rgb: Float[np.ndarray, "h w 3"]) -> bytes:
    """A picture of values from 0 to 1 as PNG (RFC 2083): header, one compressed block of rows, end."""
    pixels: UInt8[np.ndarray, "h w 3"] = np.rint(np.clip(rgb, 0, 1) * 255).astype(np.uint8)
    height, width, _ = pixels.shape
    rows = np.pad(pixels.reshape(height, -1), [(0, 0), (1, 0)])  # Each row begins with its filter: 0, none.
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)  # 8 bits, red green blue
    result = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")):
        result += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return result


def _grid(registration: Registration, across: int, shown: tuple[int, int], size: tuple[float, float]) -> str:
    """Every few rows and columns of the middle plane of the fixed lattice, where u takes them, as a drawing."""
    displacement = registration.displacement
    plane = np.take(displacement, displacement.shape[across] // 2, axis=across)[..., list(shown)]
    last = np.maximum(np.subtract(plane.shape[:2], 1), 1)
    points = (np.stack(np.indices(plane.shape[:2]), axis=-1) + plane) / last * size
    points[..., 1] = size[1] - points[..., 1]
    lines = []
    for rows in (points, points.swapaxes(0, 1)):
        for line in rows[:: max(1, len(rows) // 30)]:
            lines.append("M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in line[:: max(1, len(line) // 60)]))
    path = f'<path d="{"".join(lines)}" fill="none" stroke="{COLORS[0]}" stroke-width="0.6"/>'
    return f'<svg width="{size[0]:.0f}" height="{size[1]:.0f}">{path}</svg>'


def _curve(registration: Registration) -> str:
    """Similarity of every step, a colour for each stage, as a drawing."""
    stages = [stage for stage in registration.stages if stage.similarity]
    if not stages:
        return "<p>no steps</p>\n"
    width, height, margin = 600, 220, 50
    values = np.concatenate([stage.similarity for stage in stages])
    low, high = values.min(), max(values.max(), values.min() + 1e-9)

    def place(step, value):
        return f"{margin + step / len(values) * width:.1f},{10 + (high - value) / (high - low) * height:.1f}"

    parts, start = [], 0
    for number, stage in enumerate(stages):
        steps = range(start, start + len(stage.similarity))
        points, color = " ".join(map(place, steps, stage.similarity)), COLORS[number % len(COLORS)]
        label = f"{'x'.join(map(str, stage.grid_size))} on {'x'.join(map(str, stage.shape))} voxels"
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<text x="{margin + width + 10}" y="{20 + 18 * number}" fill="{color}">{label}</text>')
        start = steps.stop
    for value in (low, high):
        parts.append(f'<text x="0" y="{place(0, value).split(",")[1]}">{value:.3f}</text>')
    for step in (0, len(values)):
        parts.append(f'<text x="{place(step, low).split(",")[0]}" y="{height + 30}">{step}</text>')
    return f'<svg width="{width + 320}" height="{height + 40}" font-size="13">{"".join(parts)}</svg>\n'
