"""The anatomical half of the phantom: a beating, contrast-filled heart and the thorax around it.

The heart is modelled in a frame in mm from the centre of the left ventricle's base. One rotation,
one scale and one smooth deformation carry it into the body. Lungs, vessels, oesophagus, airways,
diaphragm and skeleton are placed relative to the heart and to the size of the rib cage, as in a
real chest.
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

# MM-WHS values.
LABELS = {"myo": 205, "la": 420, "lv": 500, "ra": 550, "rv": 600, "ao": 820, "pa": 850}
# A piece of a vessel: start and end in mm, and the radii at both.
Segment = tuple[Array, Array, Array]
# In HU.
AIR, FAT, MUSCLE, SKIN, CARTILAGE, CORTEX = -1000.0, -102.0, 55.0, 15.0, 105.0, 720.0

# Heart frame: unit vectors towards the apex, the septum and the anterior wall; points in mm (left,
# posterior, up).
APEX = np.array([0.66, -0.52, -0.54]) / np.linalg.norm([0.66, -0.52, -0.54])
SEPTUM = np.cross(APEX, [0.235, -0.539, 0.807]) / np.linalg.norm(
    np.cross(APEX, [0.235, -0.539, 0.807])
)
ANTERIOR = np.cross(SEPTUM, APEX)
# In mm at end diastole.
LV_RADIUS, LV_HALF_LENGTH, LV_EQUATOR = 24.0, 65.0, 15.0
LA_CENTRE, LA_RADII = np.array([-16.0, 20.0, 14.0]), np.array([30.0, 21.0, 24.0])
RA_CENTRE, RA_RADII = np.array([-47.0, -11.0, -6.0]), np.array([23.0, 27.0, 33.0])
# Along apex, septum and anterior.
RV_CENTRE, RV_RADII = np.array([22.0, 24.0, -2.0]), np.array([50.0, 34.0, 36.0])
# The points where the pulmonary veins leave the labels.
VEINS = ((-50, 24, 27), (-46, 34, 6), (20, 30, 29), (20, 38, 8))
AORTA = ((-14, -18, 20), (-22, -21, 36), (-25, -20, 51), (-23, -15, 61))
OUTFLOW = ((0, -34, -6), (5, -46, 10), (8, -44, 27))
TRUNK = ((8, -44, 27), (12, -37, 41), (14, -20, 51))
RIGHT_PA = ((14, -20, 51), (4, 2, 52), (-18, 11, 51), (-46, 12, 48))
LEFT_PA = ((14, -20, 51), (25, 2, 54), (36, 20, 51))
SVC = ((-46, -10, 16), (-48, -10, 40), (-49, -14, 90))
IVC = ((-42, 0, -22), (-38, 6, -50), (-36, 10, -110))
CARINA = np.array([-17.0, 34, 64])
RIGHT_MAIN, LEFT_MAIN = np.array([-46.0, 36, 44]), np.array([18.0, 42, 42])
CORONARIES = (
    ((2, -18, 8), (16, -38, 8), (34, -50, -6), (56, -62, -30)),  # left anterior descending
    ((2, -18, 8), (22, -12, 14), (36, 6, 2), (38, 16, -14)),  # circumflex
    ((-14, -24, 10), (-30, -40, 2), (-36, -38, -22), (-22, -22, -42)),  # right
)


@dataclass(frozen=True)
class Parameters:
    """Everything that distinguishes one patient; lengths in mm, angles in degrees, HU."""

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
        """Transform points of the heart frame to the body.

        Args:
            points: (..., 3) in mm.

        Returns:
            (..., 3) in mm.
        """
        return self.origin + self.scale * np.asarray(points, float) @ self.rotation.T


def heart_pose(p: Parameters) -> Pose:
    """Compute the place of a patient's heart.

    Args:
        p: The patient.

    Returns:
        The pose.
    """
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
    """Compute the distance to a vessel whose radius changes linearly.

    Args:
        grid: The sampling positions.
        pose: The pose of the heart.
        points: The vessel's centreline in the heart frame, (n, 3) in mm.
        start: Its first radius in mm.
        end: Its last radius in mm.
        reach: The distance in mm outside the vessel up to which the result is exact.

    Returns:
        (Z, Y, X) in mm.
    """
    path = curve(pose.place(points))
    return tube(grid, path, pose.scale * np.linspace(start, end, len(path)), reach)


def heart_distances(p: Parameters, pose: Pose, grid: Grid) -> dict[str, Array]:
    """Compute the distances to the seven labelled structures, which do not overlap.

    Args:
        p: The patient.
        pose: The pose of the heart.
        grid: The sampling positions.

    Returns:
        (Z, Y, X) in mm by the keys of `LABELS`.
    """
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

    # The valves share the base of the cavity.
    size = radius / LV_RADIUS
    aortic, mitral = 8 * size * (SEPTUM + ANTERIOR), -7 * size * (SEPTUM + ANTERIOR)
    root = np.array([aortic + 3 * APEX, aortic - 6 * APEX, *np.array(AORTA)])
    root_radii = scale * np.interp(
        np.linspace(0, 1, 3 * (len(root) - 1) + 1),
        [0, 0.18, 0.3, 0.45, 1],
        [11.5 * size, 12 * size, 16.5, 14.5, 14],
    )
    aorta = np.maximum(tube(grid, curve(pose.place(root)), root_radii), base)
    flow = pose.rotation @ (np.array(TRUNK[1]) - TRUNK[0]).astype(float)
    # The pulmonary valve separates the trunk from the outflow tract.
    valve = plane(grid, pose.place(TRUNK[0]), -flow)
    trunk = np.maximum(vessel(grid, pose, TRUNK, 12.5, 13.5), valve)
    branches = np.minimum(vessel(grid, pose, RIGHT_PA, 11, 9), vessel(grid, pose, LEFT_PA, 11.5, 9))
    pulmonary = cut(smooth_union(trunk, branches, 4), aorta - 2.5, epicardium - 1)

    # The atria fill while the ventricles empty.
    filling = 1 + 0.07 * p.phase
    turned = pose.rotation.T
    atrium = ellipsoid(grid, pose.place(LA_CENTRE), turned, scale * filling * LA_RADII)
    for end in VEINS:
        inner = LA_CENTRE + 0.5 * (np.array(end) - LA_CENTRE)
        atrium = smooth_union(atrium, vessel(grid, pose, (inner, end), 8.5, 6.5), 6)
    inflow = np.maximum(
        vessel(grid, pose, (LA_CENTRE - 4 * APEX, mitral + 3 * APEX), 13 * size, 13 * size), base
    )
    left_atrium = cut(np.minimum(cut(atrium, epicardium), inflow), aorta - 2.5, pulmonary - 2)

    ventricle = ellipsoid(
        grid,
        pose.place(RV_CENTRE @ np.array([APEX, SEPTUM, ANTERIOR])),
        axes,
        scale * (1 - 0.09 * p.phase) * RV_RADII,
    )
    ventricle = smooth_union(
        np.maximum(ventricle, -base - 11), vessel(grid, pose, OUTFLOW, 17, 13), 5
    )
    right_ventricle = cut(ventricle, epicardium, aorta - 2.5, left_atrium - 3, pulmonary)
    right_atrium = ellipsoid(grid, pose.place(RA_CENTRE), turned, scale * filling * RA_RADII)
    right_atrium = cut(
        right_atrium, right_ventricle, left_atrium - 3, aorta - 3, pulmonary - 2, epicardium
    )
    myocardium = cut(epicardium, chamber, left_atrium, aorta)
    return {
        "rv": right_ventricle,
        "ra": right_atrium,
        "pa": pulmonary,
        "la": left_atrium,
        "ao": aorta,
        "myo": myocardium,
        "lv": chamber,
    }


def heart_box(pose: Pose, grid: Grid) -> tuple[tuple[slice, slice, slice], Grid]:
    """Find the part of the grid that may contain the heart and its great vessels.

    Args:
        pose: The pose of the heart.
        grid: The sampling positions.

    Returns:
        The index of that part, and its grid.
    """
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
    """Draw walls, coronary arteries, blood and myocardium, and write the labels.

    Args:
        canvas: (Z, Y, X) in HU, changed in place.
        labels: (Z, Y, X) MM-WHS values, changed in place.
        p: The patient.
        pose: The pose of the heart.
        grid: The sampling positions.
        parts: The distances of `heart_distances`.
        edge: The width of a sample in mm.
    """
    for name, thickness in (("ra", 2.0), ("rv", 3.0), ("la", 2.0), ("pa", 1.6), ("ao", 1.8)):
        blend(canvas, parts[name] - thickness, p.myocardium if name == "rv" else MUSCLE, edge)
    for path in CORONARIES:
        blend(canvas, vessel(grid, pose, path, 2.0, 1.2, 3.0), p.blood["ao"], edge)
    z = grid.points()[2]
    for name, distance in parts.items():
        value: float | Array = p.myocardium if name == "myo" else p.blood[name]
        if name == "ra":
            # Blood without contrast streams along the septum from below.
            wave = np.sin((z - np.float32(pose.origin[2])) / np.float32(14))
            value = value + np.float32(p.streaming) * wave
        blend(canvas, distance, value, edge)
        labels[distance < 0] = LABELS[name]
    # The papillary muscles have the blood pool's label, as in MM-WHS.
    for side in (-1, 1):
        ends = [
            (LV_EQUATOR + along) * APEX + 11 * side * ANTERIOR - 9 * SEPTUM for along in (8.0, 32.0)
        ]
        blend(
            canvas, np.maximum(vessel(grid, pose, ends, 2.6, 4.0), parts["lv"]), p.myocardium, edge
        )


@dataclass(frozen=True)
class Torso:
    """The parts of the body that do not change along z, as (1, Y, X) maps in mm.

    They are seen from the body's centre.
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
    """Compute the cross-section of a patient's trunk.

    Args:
        p: The patient.
        pose: The pose of the heart.
        grid: The sampling positions.

    Returns:
        The cross-section.
    """
    s = np.float32(p.skeleton)
    x = grid.x[None, None, :] - np.float32(p.body[0])
    y = grid.y[None, :, None] - np.float32(p.body[1])
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
    """Grow branching arteries and veins in both lungs.

    Args:
        p: The patient, whose `texture` decides the branches.
        pose: The pose of the heart.

    Returns:
        The segments of all trees.
    """
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
    """Draw a bone: a cortical shell around spongy marrow.

    Args:
        canvas: (Z, Y, X) in HU, changed in place.
        distance: The distance to the bone in mm.
        marrow: HU of the marrow at normal density.
        density: Relative to the template.
        edge: The width of a sample in mm.
        shell: The thickness of the shell in mm.
    """
    blend(canvas, distance, CORTEX * density, edge)
    blend(canvas, distance + shell, marrow * density, edge)


def draw_lungs(
    canvas: Array, p: Parameters, t: Torso, grid: Grid, tree: list[Segment], edge: float
) -> None:
    """Fill the rib cage with lung, denser towards the back, and its vessels.

    Args:
        canvas: (Z, Y, X) in HU, changed in place.
        p: The patient.
        t: The cross-section.
        grid: The sampling positions.
        tree: The vessels.
        edge: The width of a sample in mm.
    """
    canvas += p.lung + 0.28 * t.y
    for a, b, radii in tree:
        index, near = grid.box(np.minimum(a, b) - radii[0] - 2, np.maximum(a, b) + radii[0] + 2)
        if 0 not in near.shape:
            blend(
                canvas[index], tube(near, np.array([a, b]), radii, 2.0), 0.8 * p.blood["pa"], edge
            )


def draw_abdomen(canvas: Array, p: Parameters, t: Torso, grid: Grid, edge: float) -> None:
    """Draw diaphragm, liver, stomach and spleen below the domes.

    Args:
        canvas: (Z, Y, X) in HU, changed in place.
        p: The patient.
        t: The cross-section.
        grid: The sampling positions.
        edge: The width of a sample in mm.
    """
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
    """Draw vessels, airways and oesophagus outside the labels.

    Args:
        canvas: (Z, Y, X) in HU, changed in place.
        p: The patient.
        pose: The pose of the heart.
        t: The cross-section.
        grid: The sampling positions.
        edge: The width of a sample in mm.
    """
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
    carina, right_main, left_main = (pose.place(point) for point in (CARINA, RIGHT_MAIN, LEFT_MAIN))
    down = np.array([22.0, 8, -14])
    airways = np.minimum(
        tube(grid, np.array([carina + np.array([0, -6, 60]), carina]), np.array([9.0, 8.5])),
        tube(
            grid,
            np.array([carina, right_main, right_main + down * [-1, 1, 1]]),
            np.array([8.0, 6.5, 3.5]),
        ),
    )
    airways = np.minimum(
        airways,
        tube(grid, np.array([carina, left_main, left_main + down]), np.array([7.5, 6, 3.5])),
    )
    blend(canvas, airways - 1.8, 30.0, edge)
    blend(canvas, airways, -980.0, edge)


def lung_distance(p: Parameters, t: Torso, grid: Grid, heart: Array) -> Array:
    """Compute the distance to the aerated lungs.

    They are the rib cage without mediastinum, spine and everything under the diaphragm.

    Args:
        p: The patient.
        t: The cross-section.
        grid: The sampling positions.
        heart: The distance to the heart, (Z, Y, X) in mm.

    Returns:
        (Z, Y, X) in mm.
    """
    spine = np.hypot(t.x / 1.25, t.y - 62 * p.skeleton) - 20 * p.skeleton
    still = np.maximum(np.maximum(t.r - t.cage + 7, -t.middle), -spine)
    margin = np.float32(3.0 + 0.14 * p.fat)
    return np.maximum(np.maximum(still, margin - heart), t.dome - grid.points()[2])


def draw_wall(canvas: Array, p: Parameters, t: Torso, grid: Grid, edge: float) -> None:
    """Draw the chest wall from the pleura outwards, and the air and the table outside.

    The wall is muscle, fat and skin.

    Args:
        canvas: (Z, Y, X) in HU, changed in place.
        p: The patient.
        t: The cross-section.
        grid: The sampling positions.
        edge: The width of a sample in mm.
    """
    blend(canvas, t.cage - 6.5 - t.r, MUSCLE, edge)
    # Fat lies between the ribs and the muscles over them.
    seam = np.abs(t.r - t.cage - 8) - 1.2
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
    """Draw the vertebral column, the ribs with their cartilage, and the sternum.

    Args:
        canvas: (Z, Y, X) in HU, changed in place.
        p: The patient.
        t: The cross-section.
        grid: The sampling positions.
        edge: The width of a sample in mm.
    """
    s, z, bone = p.skeleton, grid.points()[2], p.bone
    pitch = 27 * s
    # 0 in the middle of a vertebra.
    level = np.abs(np.mod(z + p.vertebra * pitch, pitch) - pitch / 2)
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

    # Ribs fall from the spine to the bend, then rise as cartilage to the sternum.
    step, bend = 26 * s, 2.42
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
    """Draw a patient slab by slab.

    Args:
        p: The patient.
        grid: The sampling positions.
        edge: The width of a sample in mm.
        slab: Samples along z at a time.

    Yields:
        The range along z, HU and MM-WHS labels, (slab, Y, X).
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
