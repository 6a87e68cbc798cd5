"""Anatomical half of the phantom: a beating, contrast-filled heart and the thorax built around it.

The heart is modelled in its own frame, in mm from the centre of the left ventricle's base, and
carried into the body by one rotation, one scale and one smooth deformation.  Lungs, vessels,
oesophagus, airways, diaphragm and skeleton are placed relative to the heart and to the size of the
rib cage, as in a real chest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from train.phantom.physics import (
    FAR,
    Array,
    Grid,
    Warp,
    blend,
    curve,
    cut,
    ellipsoid,
    plane,
    ring,
    smooth_union,
    tube,
)

LABELS = {
    "myo": 205,
    "la": 420,
    "lv": 500,
    "ra": 550,
    "rv": 600,
    "ao": 820,
    "pa": 850,
}  # MM-WHS values
Segment = tuple[Array, Array, Array]  # of a vessel: start, end (mm) and the radii at both
AIR, FAT, MUSCLE, SKIN, CARTILAGE, CORTEX = -1000.0, -102.0, 55.0, 15.0, 105.0, 720.0  # HU

# Heart frame: unit vectors towards the apex, the septum and the anterior wall; points in mm (left,
# posterior, up).
APEX = np.array([0.66, -0.52, -0.54]) / np.linalg.norm([0.66, -0.52, -0.54])
SEPTUM = np.cross(APEX, [0.235, -0.539, 0.807]) / np.linalg.norm(
    np.cross(APEX, [0.235, -0.539, 0.807])
)
ANTERIOR = np.cross(SEPTUM, APEX)
LV_RADIUS, LV_HALF_LENGTH, LV_EQUATOR = 24.0, 65.0, 15.0  # mm at end diastole
LA_CENTRE, LA_RADII = np.array([-16.0, 20.0, 14.0]), np.array([30.0, 21.0, 24.0])
RA_CENTRE, RA_RADII = np.array([-47.0, -11.0, -6.0]), np.array([23.0, 27.0, 33.0])
RV_CENTRE, RV_RADII = (
    np.array([22.0, 24.0, -2.0]),
    np.array([50.0, 34.0, 36.0]),
)  # along apex, septum, anterior
VEINS = (
    (-50, 24, 27),
    (-46, 34, 6),
    (20, 30, 29),
    (20, 38, 8),
)  # where the pulmonary veins leave the labels
AORTA = ((-14, -18, 20), (-22, -21, 36), (-25, -20, 51), (-23, -15, 61))
OUTFLOW = ((0, -34, -6), (5, -46, 10), (8, -44, 27))
TRUNK = ((8, -44, 27), (12, -37, 41), (14, -20, 51))
RIGHT_PA = ((14, -20, 51), (4, 2, 52), (-18, 11, 51), (-46, 12, 48))
LEFT_PA = ((14, -20, 51), (25, 2, 54), (36, 20, 51))
SVC = ((-46, -10, 16), (-48, -10, 40), (-49, -14, 90))
IVC = ((-42, 0, -22), (-38, 6, -50), (-36, 10, -110))
CARINA, RIGHT_MAIN, LEFT_MAIN = (
    np.array([-17.0, 34, 64]),
    np.array([-46.0, 36, 44]),
    np.array([18.0, 42, 42]),
)
CORONARIES = (
    ((2, -18, 8), (16, -38, 8), (34, -50, -6), (56, -62, -30)),  # left anterior descending
    ((2, -18, 8), (22, -12, 14), (36, 6, 2), (38, 16, -14)),  # circumflex
    ((-14, -24, 10), (-30, -40, 2), (-36, -38, -22), (-22, -22, -42)),  # right
)


@dataclass(frozen=True)
class Parameters:
    """Everything that distinguishes one patient; lengths in mm, angles in degrees, attenuation
    in HU.
    """

    skeleton: float  # size of the rib cage relative to the template
    fat: float  # thickness of the subcutaneous fat
    heart: float  # size of the heart relative to the template
    phase: float  # 0 end diastole .. 1 end systole
    yaw: float  # heart's rotation about the body axis,
    tilt: float  # about the transverse axis
    roll: float  # and about the sagittal axis
    body: tuple[float, float]  # centre of the body, (x, y)
    shift: tuple[float, float, float]  # of the heart from its usual place
    wall: float  # thickness of the left ventricle's wall at end diastole
    blood: dict[str, float]  # by chamber
    myocardium: float
    streaming: float  # amplitude of unmixed contrast in the right atrium
    bone: float  # density of bone relative to the template
    liver: float
    spleen: float
    lung: float
    dome: float  # height of the right diaphragm above the heart's base
    vertebra: float  # phase of the vertebral column along z
    rib: float  # phase of the ribs along z
    stomach_gas: float  # depth of the gas bubble
    breast: float  # depth of the breasts, 0 for none
    noise: float  # standard deviation at the centre of an average patient
    warp: Warp
    texture: int  # key of the lung vessels and of the noise


@dataclass(frozen=True)
class Pose:
    """The heart frame in the body: ``origin + scale * rotation @ point``."""

    origin: Array
    rotation: Array
    scale: float

    def place(self, points: ArrayLike) -> Array:
        """Body coordinates in mm of heart-frame points (..., 3)."""
        return self.origin + self.scale * np.asarray(points, float) @ self.rotation.T


def heart_pose(p: Parameters) -> Pose:
    """Where the heart of a patient lies."""
    (cz, sz), (cx, sx), (cy, sy) = (
        (np.cos(a), np.sin(a)) for a in np.radians([p.yaw, p.tilt, p.roll])
    )
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    usual = np.array([p.body[0] + 18 * p.skeleton, p.body[1] - 20 * p.skeleton, -7.0])
    return Pose(usual + p.shift, about_z @ about_x @ about_y, p.heart)


def vessel(
    grid: Grid, pose: Pose, points: ArrayLike, start: float, end: float, reach: float = 8.0
) -> Array:
    """Distance to a vessel along heart-frame ``points``, its radius going from ``start`` to
    ``end`` mm.
    """
    path = curve(pose.place(points))
    return tube(grid, path, pose.scale * np.linspace(start, end, len(path)), reach)


def heart_distances(p: Parameters, pose: Pose, grid: Grid) -> dict[str, Array]:
    """Distances (Z, Y, X) in mm to the seven labelled structures; no two of them overlap."""
    scale, axes = pose.scale, np.array([APEX, SEPTUM, ANTERIOR]) @ pose.rotation.T
    radius = LV_RADIUS * (1 - 0.16 * p.phase)
    wall = p.wall * (1 + 0.38 * p.phase)
    radii = np.array([LV_HALF_LENGTH * (1 - 0.08 * p.phase), radius, radius])
    base = plane(grid, pose.origin, axes[0])
    equator = pose.place(LV_EQUATOR * APEX)
    chamber = np.maximum(ellipsoid(grid, equator, axes, scale * radii), -base)
    epicardium = np.maximum(
        ellipsoid(grid, equator, axes, scale * (radii + wall * np.array([0.8, 1, 1]))), -base - 5.5
    )

    size = radius / LV_RADIUS  # the valves share the base of the cavity
    aortic, mitral = 8 * size * (SEPTUM + ANTERIOR), -7 * size * (SEPTUM + ANTERIOR)
    root = np.array([aortic + 3 * APEX, aortic - 6 * APEX, *np.array(AORTA)])
    root_radii = scale * np.interp(
        np.linspace(0, 1, 3 * (len(root) - 1) + 1),
        [0, 0.18, 0.3, 0.45, 1],
        [11.5 * size, 12 * size, 16.5, 14.5, 14],
    )
    aorta = np.maximum(tube(grid, curve(pose.place(root)), root_radii), base)
    flow = pose.rotation @ (np.array(TRUNK[1]) - TRUNK[0]).astype(float)
    valve = plane(
        grid, pose.place(TRUNK[0]), -flow
    )  # the pulmonary valve parts the trunk from the outflow tract
    trunk = np.maximum(vessel(grid, pose, TRUNK, 12.5, 13.5), valve)
    branches = np.minimum(vessel(grid, pose, RIGHT_PA, 11, 9), vessel(grid, pose, LEFT_PA, 11.5, 9))
    pulmonary = cut(smooth_union(trunk, branches, 4), aorta - 2.5, epicardium - 1)

    filling = 1 + 0.07 * p.phase  # the atria fill while the ventricles empty
    turned = pose.rotation.T
    atrium = ellipsoid(grid, pose.place(LA_CENTRE), turned, scale * filling * LA_RADII)
    for end in VEINS:
        inner = LA_CENTRE + 0.5 * (np.array(end) - LA_CENTRE)
        atrium = smooth_union(atrium, vessel(grid, pose, (inner, end), 8.5, 6.5), 6)
    inflow = np.maximum(
        vessel(grid, pose, (LA_CENTRE - 4 * APEX, mitral + 3 * APEX), 13 * size, 13 * size), base
    )
    left = cut(np.minimum(cut(atrium, epicardium), inflow), aorta - 2.5, pulmonary - 2)

    ventricle = ellipsoid(
        grid,
        pose.place(RV_CENTRE @ np.array([APEX, SEPTUM, ANTERIOR])),
        axes,
        scale * (1 - 0.09 * p.phase) * RV_RADII,
    )
    ventricle = smooth_union(
        np.maximum(ventricle, -base - 11), vessel(grid, pose, OUTFLOW, 17, 13), 5
    )
    right_ventricle = cut(ventricle, epicardium, aorta - 2.5, left - 3, pulmonary)
    right = ellipsoid(grid, pose.place(RA_CENTRE), turned, scale * filling * RA_RADII)
    right = cut(right, right_ventricle, left - 3, aorta - 3, pulmonary - 2, epicardium)
    myocardium = cut(epicardium, chamber, left, aorta)
    return {
        "rv": right_ventricle,
        "ra": right,
        "pa": pulmonary,
        "la": left,
        "ao": aorta,
        "myo": myocardium,
        "lv": chamber,
    }


def heart_box(pose: Pose, grid: Grid) -> tuple[tuple[slice, slice, slice], Grid]:
    """The part of the grid that may hold the heart and its great vessels."""
    centre, reach = pose.origin + np.array([8.0, -12, 0]), pose.scale * np.array([105.0, 95, 105])
    return grid.box(centre - reach, centre + reach)


def draw_heart(
    canvas: Array,
    labels: NDArray[np.uint16],
    p: Parameters,
    pose: Pose,
    grid: Grid,
    parts: dict[str, Array],
    edge: float,
) -> None:
    """Synthesize walls, coronary arteries, blood and myocardium (HU), and write the labels."""
    for name, thickness in (("ra", 2.0), ("rv", 3.0), ("la", 2.0), ("pa", 1.6), ("ao", 1.8)):
        blend(canvas, parts[name] - thickness, p.myocardium if name == "rv" else MUSCLE, edge)
    for path in CORONARIES:
        blend(canvas, vessel(grid, pose, path, 2.0, 1.2, 3.0), p.blood["ao"], edge)
    z = grid.points()[2]
    for name, distance in parts.items():
        value: float | Array = p.myocardium if name == "myo" else p.blood[name]
        if name == "ra":  # unopacified blood from below streams along the septum
            value = value + np.float32(p.streaming) * np.sin(
                (z - np.float32(pose.origin[2])) / np.float32(14)
            )
        blend(canvas, distance, value, edge)
        labels[distance < 0] = LABELS[name]
    for side in (-1, 1):  # papillary muscles: within the blood pool's label, as in MM-WHS
        ends = [
            (LV_EQUATOR + along) * APEX + 11 * side * ANTERIOR - 9 * SEPTUM for along in (8.0, 32.0)
        ]
        blend(
            canvas, np.maximum(vessel(grid, pose, ends, 2.6, 4.0), parts["lv"]), p.myocardium, edge
        )


@dataclass(frozen=True)
class Torso:
    """The parts of the body that do not change along z, as (1, Y, X) maps in mm, seen from the
    body's centre.
    """

    x: Array
    y: Array
    r: Array  # distance from the centre
    phi: Array  # angle from the spine, 0 posterior .. pi anterior
    cage: Array  # radius of the ribs' centreline
    muscle: Array  # radius of the outer surface of the muscles
    skin: Array  # radius of the skin
    dome: Array  # height of the diaphragm
    middle: Array  # distance to the central mediastinum


def torso(p: Parameters, pose: Pose, grid: Grid) -> Torso:
    """Cross-section of a patient's trunk."""
    s = np.float32(p.skeleton)
    x, y = (
        grid.x[None, None, :] - np.float32(p.body[0]),
        grid.y[None, :, None] - np.float32(p.body[1]),
    )
    r, phi = np.hypot(x, y) + np.float32(1e-3), np.arctan2(np.abs(x), y)

    def outline(a: float, b: float, n: float) -> Array:
        return r / (np.abs(x / a) ** n + np.abs(y / b) ** n) ** (1 / n)

    cage = outline(121 * s, 90 * s, 2.35) * (1 - 0.13 * np.exp(-((phi / 0.4) ** 2)))
    pectoral = 9 * np.exp(-(((phi - 2.45) / 0.3) ** 2)) + 9 * np.exp(-(((phi - 1.35) / 0.45) ** 2))
    dorsal = 21 * np.exp(-((phi / 0.45) ** 2))
    muscle = cage + 7 + s * (pectoral + dorsal)
    skin = outline(121 * s + 16 + 0.9 * p.fat, 90 * s + 11 + p.fat, 2.45)
    skin = np.maximum(skin, muscle + 4)
    height = pose.origin[2] + p.dome

    def bowl(cx: float, cy: float, top: float) -> Array:
        return (
            height + top - 55 * ((x - cx * s) / (80 * s)) ** 2 - 45 * ((y - cy * s) / (80 * s)) ** 2
        )

    dome = np.maximum(np.maximum(bowl(-68, -12, 0), bowl(72, -8, -13)), bowl(20, -30, -24))
    lean = 0.35 * (pose.origin[0] - p.body[0])
    middle = (
        np.abs(x - lean * np.clip(-y / 60, -0.5, 1))
        - (12 + 16 * np.exp(-(((y + 5) / 34) ** 2))) * s
    )
    return Torso(*(a.astype(np.float32) for a in (x, y, r, phi, cage, muscle, skin, dome, middle)))


def lung_vessels(p: Parameters, pose: Pose) -> list[Segment]:
    """Branching arteries and veins of both lungs: the segments of all trees."""
    rng = np.random.Generator(np.random.Philox(key=[p.texture, 1]))
    trees = []
    roots = [(RIGHT_PA[-1], -1, 6.5), (LEFT_PA[-1], 1, 6.5)] + [
        (end, np.sign(end[0] + 15), 5.0) for end in VEINS
    ]
    for point, side, radius in roots:
        for _ in range(3):
            heading = np.array(
                [side * rng.uniform(0.3, 1), rng.uniform(-0.8, 0.8), rng.uniform(-1, 0.8)]
            )
            trees.append((pose.place(point), heading, radius * 0.72, 0))
    segments = []
    while trees:
        start, heading, radius, depth = trees.pop()
        heading = heading / np.linalg.norm(heading)
        end = start + heading * rng.uniform(14, 26) * 0.93**depth
        segments.append((start, end, np.array([radius, radius * 0.88])))
        side = np.hypot(
            (end[0] - p.body[0]) / (112 * p.skeleton), (end[1] - p.body[1]) / (82 * p.skeleton)
        )
        if depth < 7 and side < 0.97 and abs(end[2]) < 90:
            for _ in range(2 if depth < 6 else 1):
                trees.append(
                    (
                        end,
                        heading + 0.55 * rng.standard_normal(3),
                        radius * rng.uniform(0.7, 0.86),
                        depth + 1,
                    )
                )
    return segments


def draw_bone(
    canvas: Array, distance: Array, marrow: float, density: float, edge: float, shell: float = 1.5
) -> None:
    """A bone: cortical shell around spongy marrow (HU)."""
    blend(canvas, distance, CORTEX * density, edge)
    blend(canvas, distance + shell, marrow * density, edge)


def draw_lungs(
    canvas: Array, p: Parameters, t: Torso, grid: Grid, tree: list[Segment], edge: float
) -> None:
    """Fill the whole cage with lung, denser towards the back, and its vessels."""
    canvas += p.lung + 0.28 * t.y
    for a, b, radii in tree:
        index, near = grid.box(np.minimum(a, b) - radii[0] - 2, np.maximum(a, b) + radii[0] + 2)
        if 0 not in near.shape:
            blend(
                canvas[index], tube(near, np.array([a, b]), radii, 2.0), 0.8 * p.blood["pa"], edge
            )


def draw_abdomen(canvas: Array, p: Parameters, t: Torso, grid: Grid, edge: float) -> None:
    """Diaphragm, liver, stomach and spleen below the domes."""
    below = grid.points()[2] - t.dome
    blend(canvas, below, MUSCLE, edge)
    blend(canvas, below + 2.5, FAT, edge)
    inside, s = np.maximum(below + 3, t.r - t.cage + 7), p.skeleton
    top = float(t.dome.max())
    centre, eye = np.array([*p.body, top]), np.eye(3)
    spleen = ellipsoid(
        grid, centre + s * np.array([82, 34, -42]), eye, s * np.array([34.0, 46, 42])
    )
    stomach = ellipsoid(
        grid, centre + s * np.array([56, -22, -46]), eye, s * np.array([48.0, 44, 36])
    )
    blend(canvas, np.maximum(spleen, inside), p.spleen, edge)
    blend(canvas, np.maximum(stomach, inside), 50.0, edge)
    blend(canvas, np.maximum(stomach + 4, inside), 25.0, edge)
    blend(
        canvas,
        np.maximum(np.maximum(stomach + 4, inside), t.y + 55 * s - p.stomach_gas),
        -950.0,
        edge,
    )
    liver = t.x - (12 - 0.55 * (t.y + 10)) * s
    blend(canvas, np.maximum(liver, inside), p.liver, edge)


def draw_mediastinum(
    canvas: Array, p: Parameters, pose: Pose, t: Torso, grid: Grid, edge: float
) -> None:
    """Vessels, airways and oesophagus outside the labels."""
    s, (cx, cy) = p.skeleton, p.body
    low = np.array([cx + 14 * s, cy + 34 * s, -120])
    high = np.array([cx + 25 * s, cy + 30 * s, pose.place(AORTA[-1])[2] - 8])
    bend = pose.place([(6, 17, 77), (-12, -2, 77), AORTA[-1]])
    arch = np.vstack([low, (low + high) / 2 + [4, 0, 0], high, bend])
    aorta = tube(grid, curve(arch), p.heart * np.linspace(11.5, 13.5, 16))
    superior, inferior = vessel(grid, pose, SVC, 9.5, 8.5), vessel(grid, pose, IVC, 11, 12)
    for distance, value in (
        (aorta, p.blood["ao"]),
        (superior, 1.1 * p.blood["ra"]),
        (inferior, 130.0),
    ):
        blend(canvas, distance - 1.6, MUSCLE, edge)
        blend(canvas, distance, value, edge)
    gullet = ellipsoid(
        grid, np.array([cx + 8 * s, cy + 25 * s, 0]), np.eye(3), np.array([9.0, 5.5, 1e4])
    )
    blend(canvas, gullet, 45.0, edge)
    carina, right, left = (pose.place(point) for point in (CARINA, RIGHT_MAIN, LEFT_MAIN))
    down = np.array([22.0, 8, -14])
    airways = np.minimum(
        tube(grid, np.array([carina + np.array([0, -6, 60]), carina]), np.array([9.0, 8.5])),
        tube(grid, np.array([carina, right, right + down * [-1, 1, 1]]), np.array([8.0, 6.5, 3.5])),
    )
    airways = np.minimum(
        airways, tube(grid, np.array([carina, left, left + down]), np.array([7.5, 6, 3.5]))
    )
    blend(canvas, airways - 1.8, 30.0, edge)
    blend(canvas, airways, -980.0, edge)


def lung_distance(p: Parameters, t: Torso, grid: Grid, heart: Array) -> Array:
    """Distance (Z, Y, X) to the aerated lungs: cage less mediastinum, spine and all that lies
    under the diaphragm.
    """
    spine = np.hypot(t.x / 1.25, t.y - 62 * p.skeleton) - 20 * p.skeleton
    still = np.maximum(np.maximum(t.r - t.cage + 7, -t.middle), -spine)
    margin = np.float32(3.0 + 0.14 * p.fat)
    return np.maximum(np.maximum(still, margin - heart), t.dome - grid.points()[2])


def draw_wall(canvas: Array, p: Parameters, t: Torso, grid: Grid, edge: float) -> None:
    """Chest wall from the pleura outwards: muscle, fat, skin, and the air and table outside."""
    blend(canvas, t.cage - 6.5 - t.r, MUSCLE, edge)
    seam = np.abs(t.r - t.cage - 8) - 1.2  # fat between the ribs and the muscles over them
    blend(canvas, np.broadcast_to(seam, canvas.shape), 0.6 * FAT, edge)
    blend(canvas, t.muscle - t.r, FAT, edge)
    surface: Array = t.r - t.skin
    s, z = p.skeleton, grid.points()[2]
    if p.breast:
        for side in (-1, 1):
            centre = np.array([p.body[0] + side * 68 * s, p.body[1] - 88 * s - 0.6 * p.fat, -12.0])
            radii = np.array([50.0, 22 + p.breast, 62.0])
            breast = ellipsoid(grid, centre, np.eye(3), radii)
            gland = ellipsoid(
                grid, centre - np.array([0, 0.35 * p.breast, 6]), np.eye(3), 0.5 * radii
            )
            blend(canvas, np.maximum(gland, t.muscle + 6 - t.r), -10.0, edge)
            surface = smooth_union(surface, breast, 12)
    blend(canvas, -surface - 2, SKIN, edge)
    blend(canvas, -surface, AIR, edge)
    back = t.y - float(np.max(np.where(surface.min(0) < 0, t.y[0], -FAR))) - 5 + t.x**2 / 700
    shell = np.maximum(np.abs(back - 8) - 8, np.abs(t.x) - 175)
    outside = np.maximum(shell, -surface)
    blend(canvas, np.maximum(ring(shell, 1.5), outside) + 0 * z, -250.0, edge)


def draw_skeleton(canvas: Array, p: Parameters, t: Torso, grid: Grid, edge: float) -> None:
    """Vertebral column, ribs with their cartilage, and sternum."""
    s, z, bone = p.skeleton, grid.points()[2], p.bone
    pitch = 27 * s
    level = np.abs(np.mod(z + p.vertebra * pitch, pitch) - pitch / 2)  # 0 at mid-vertebra
    across, deep = t.x, t.y - 50 * s
    body = np.hypot(across, 1.28 * deep) - (17.5 - 1.5 * np.cos(level * (2 * np.pi / pitch))) * s
    blend(canvas, body, 80.0, edge)
    draw_bone(canvas, np.maximum(body, level - (pitch / 2 - 2.5)), 205.0, bone, edge)
    canal = np.hypot(across, deep - 24 * s) - 9 * s
    arch = np.maximum(np.maximum(canal - 5 * s, 6 * s - deep), level - 9 * s)
    spinous = np.maximum(
        np.hypot(across, np.maximum(np.abs(deep - 41 * s) - 9 * s, 0)) - 3.6 * s, level - 8 * s
    )
    side = np.abs(across) - 22 * s
    transverse = (
        np.hypot(np.maximum(np.abs(side) - 10 * s, 0), deep - 27 * s - 0.25 * side) - 4.5 * s
    )
    transverse = np.maximum(transverse, level - 5 * s)
    for part in (transverse, spinous, arch):
        draw_bone(canvas, part, 230.0, bone, edge)
    blend(canvas, canal + 0 * z, 5.0, edge)
    blend(canvas, canal + 4 * s + 0 * z, 45.0, edge)

    step, bend = (
        26 * s,
        2.42,
    )  # ribs fall from the spine to the bend, then rise as cartilage to the sternum
    fall = np.minimum(t.phi / bend, 1)
    drop = (78 * fall * fall * (3 - 2 * fall) - 60 * np.maximum(t.phi - bend, 0)) * s
    offset = np.mod(z + drop + p.rib * step, step) - step / 2
    rib = np.hypot(t.r - t.cage, offset * 0.62) - 4.2 * s
    rib = np.maximum(rib, 17 * s - np.abs(t.x))
    draw_bone(canvas, np.maximum(rib, (t.phi - bend) * 80), 150.0, bone, edge)
    blend(
        canvas,
        np.maximum(np.maximum(rib, (bend - t.phi) * 80), 15 * s - np.abs(t.x)),
        CARTILAGE,
        edge,
    )
    half = 17 * s - np.clip(-30 - z, 0, 24) * 0.4
    ahead = t.y + 90 * s
    sternum = np.maximum(np.abs(ahead + 0.06 * z) - 5.5 * s, np.abs(t.x) - half)
    draw_bone(canvas, np.maximum(sternum, -62 - z), 140.0, bone, edge)


def render(
    p: Parameters, grid: Grid, edge: float, slab: int = 4
) -> Iterator[tuple[slice, Array, NDArray[np.uint16]]]:
    """Yield slabs of the patient on ``grid``: the z range, HU and MM-WHS labels; ``edge`` is a
    sample's width in mm.
    """
    pose = heart_pose(p)
    t = torso(p, pose, grid)
    tree = lung_vessels(p, pose)
    for start in range(0, len(grid.z), slab):
        rows = slice(start, min(start + slab, len(grid.z)))
        part = Grid(grid.z[rows], grid.y, grid.x)
        hu, labels = np.zeros(part.shape, np.float32), np.zeros(part.shape, np.uint16)
        index, near = heart_box(pose, replace(part, warp=p.warp))
        distances = heart_distances(p, pose, near)
        heart = np.full(part.shape, FAR, np.float32)
        heart[index] = np.minimum.reduce(list(distances.values()))
        draw_lungs(hu, p, t, part, tree, edge)
        blend(hu, -lung_distance(p, t, part, heart), FAT, edge)
        draw_abdomen(hu, p, t, part, edge)
        blend(hu, np.maximum(heart - 4, t.r - t.cage + 6), FAT, edge)
        draw_mediastinum(hu, p, pose, t, replace(part, warp=p.warp), edge)
        draw_heart(hu[index], labels[index], p, pose, near, distances, edge)
        draw_wall(hu, p, t, part, edge)
        draw_skeleton(hu, p, t, part, edge)
        yield rows, hu, labels
