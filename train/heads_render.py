"""A small software renderer for `train.heads`: z-buffer, painted skin and hair, styles.

Skin, brows, lips, beard and scalp are painted by position on the head, since the mesh
data bring no textures. Hair is the scalp lifted off the head along a hair line, and for
long hair a curtain behind the face.
"""

import dataclasses

import numpy as np
from PIL import Image
from scipy import ndimage

from jaxstyle.align import ffhq_quad
from train import heads_mesh
from train.heads_params import HAIR_ANGLES, HAIR_LINES

STYLES = ("photo", "cel", "duotone", "pencil", "paint")
LABELS = (
    "background",
    "skin",
    "brows",
    "eyes",
    "lips",
    "mouth",
    "ears",
    "neck",
    "hair",
    "beard",
    "clothes",
)
CAMERA = 14.0  # distance of the camera from the head, in decimetres
SHARED = dict(zip(LABELS, range(len(LABELS)), strict=True))
# The cel and duotone styles also change the shape, as caricatures do.
CARTOON = {
    "eyes/l-eye-scale-incr": 1.5,
    "eyes/r-eye-scale-incr": 1.5,
    "nose/nose-volume-decr": 0.9,
    "nose/nose-scale-vert-decr": 0.5,
    "mouth/mouth-scale-horiz-decr": 0.25,
    "chin/chin-width-decr": 0.8,
    "head/head-invertedtriangular": 0.7,
    "head/head-age-decr": 0.35,
}
# Vertices of the base mesh under the 68 landmark points of the usual order; chosen once
# as the nearest to dlib's points on twelve frontal heads.
# fmt: off
LANDMARKS = (
    5765, 5763, 5759, 5206, 735, 737, 5295, 926, 5296, 11899, 11901, 7457,
    7455, 11817, 12356, 12219, 12362, 5262, 232, 222, 205, 209, 6984, 6980,
    6996, 7005, 11870, 132, 131, 201, 294, 325, 313, 343, 7076, 7087,
    4856, 0, 54, 72, 46, 40, 6853, 6838, 6784, 11474, 11478, 6830,
    3706, 5351, 450, 466, 7215, 11953, 7189, 7166, 7241, 492, 486, 484,
    497, 462, 493, 7221, 7246, 7242, 493, 487,
)
# fmt: on


@dataclasses.dataclass
class Canvas:
    """Flat pictures under work: colour, depth, label; `size` pixels a side."""

    size: int
    color: np.ndarray
    depth: np.ndarray
    label: np.ndarray


@dataclasses.dataclass(frozen=True)
class View:
    """The camera: rotation, turning point, and where the crop lies in its plane."""

    rotation: np.ndarray
    pivot: np.ndarray
    center: np.ndarray
    extent: float
    size: int

    def pixels(self, points):
        """[points, 3] of the head to x, y in pixels and depth, larger is nearer."""
        seen = (points - self.pivot) @ self.rotation.T
        plane = project(seen)
        x = (plane[:, 0] - self.center[0]) / self.extent * self.size + self.size / 2
        y = self.size / 2 - (plane[:, 1] - self.center[1]) / self.extent * self.size
        return np.stack([x, y, seen[:, 2]], 1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the features of one shaped head are; `vertices` [vertices, 3]."""

    vertices: np.ndarray
    eyes: tuple
    center: np.ndarray


def project(points):
    """Perspective of points [points, 3] around the turning point, [points, 2]."""
    return points[:, :2] * (CAMERA / (CAMERA - points[:, 2:]))


def shape(mesh, head, style="photo"):
    """The vertices of `head`, in the shape that `style` gives it."""
    vertices = mesh.vertices.copy()
    targets = list(head.targets.items())
    if style in ("cel", "duotone"):
        targets += CARTOON.items()
    for name, weight in targets:
        heads_mesh.add_target(mesh, vertices, name, weight)
    eyes = tuple(vertices[rows].mean(0) for rows in mesh.eyes)
    center = (eyes[0] + eyes[1]) / 2
    if head.hair_length > 0:
        sheet = hang(head, vertices[mesh.skull], center)
        vertices[len(vertices) - len(sheet) :] = sheet
    return Place(vertices, eyes, center)


def hang(head, skull, center):
    """The curtain of long hair around the skull [n, 3], [rows × columns, 3].

    An ellipse around the widest part of the skull, open in front, that falls straight,
    gathered into locks.
    """
    rows, columns = heads_mesh.CURTAIN
    offset = skull - center
    wide = np.abs(offset[:, 0]).max()
    axis = offset[np.abs(offset[:, 0]).argmax(), 2]
    deep = axis - offset[:, 2].min()
    out = 0.05 + 0.6 * head.hair_volume
    y = np.linspace(0.45, -head.hair_length - 0.1, rows)[:, None]
    open_from = np.interp(y, (-0.4, 0.45), (118, 80))
    angle = np.radians(np.linspace(-1, 1, columns) * open_from)
    fall = np.clip(0.3 - y, 0, None)
    grow = np.interp(y, (-0.6, 0.1, 0.45), (1.0, 0.9, 0.3)) * out
    grow = grow + (head.hair_volume - 0.09) * 0.8 * fall
    grow = grow + 0.03 * np.sin(11 * angle + 2 * fall + 9 * head.hair_part)
    x = np.sin(angle) * (wide + grow)
    z = axis - np.cos(angle) * (deep + grow)
    sheet = np.stack(np.broadcast_arrays(x, y, z), -1).reshape(-1, 3)
    return (center + sheet).astype(np.float32)


def look(mesh, head, place, size, yaw=0.0, pitch=0.0):
    """The view of a head in the FFHQ crop; `yaw` and `pitch` turn it further (radians).

    The crop follows the turned eyes and mouth, except that turning further keeps the
    size it had, so that a head that turns does not grow.
    """
    pivot = place.center + np.array([0, -0.35, -0.7], np.float32)
    points = place.vertices[mesh.index[list(LANDMARKS)]] - pivot

    def crop(rotation):
        down = np.array([1, -1])  # of pictures, where y points down
        quad = ffhq_quad(project(points @ rotation.T) * down)
        extent = np.linalg.norm(quad[1] - quad[0])
        return quad.mean(0) * down, extent * head.zoom

    _, extent = crop(_rotation(head.yaw, head.pitch, head.roll))
    rotation = _rotation(head.yaw + yaw, head.pitch + pitch, head.roll)
    center, _ = crop(rotation)
    return View(rotation, pivot, center, extent, size)


def _rotation(yaw, pitch, roll):
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    cr, sr = np.cos(roll), np.sin(roll)
    turn = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    nod = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    lean = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
    return (lean @ nod @ turn).astype(np.float32)


def landmarks(place, view, mesh):
    """The 68 points in pixels of the view, [68, 2]."""
    return view.pixels(place.vertices[mesh.index[list(LANDMARKS)]])[:, :2]


def render(mesh, head, size, style="photo", supersample=2, yaw=0.0, pitch=0.0):
    """Draw a head: picture uint8 [size, size, 3], labels uint8 [size, size], points.

    `supersample` pixels a side become one; `yaw` and `pitch` (radians) turn the head
    further; the points are [68, 2] in pixels of the picture.
    """
    place = shape(mesh, head, style)
    wide = size * supersample
    view = look(mesh, head, place, wide, yaw, pitch)
    rng = np.random.default_rng([head.seed, head.index, 1])
    canvas = Canvas(
        wide,
        _background(head, wide, rng),
        np.full(wide * wide, -1e9, np.float32),
        np.zeros(wide * wide, np.uint8),
    )
    painter = Painter(mesh, head, place, view, canvas, style, rng)
    painter.paint()
    image = np.clip(canvas.color, 0, 1).reshape(wide, wide, 3) ** (1 / 1.15)
    if style != "photo":
        depth = np.where(canvas.depth > -1e8, canvas.depth, -3).reshape(wide, wide)
        image = _stylize(image, depth, style, supersample, rng)
    image = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    image = np.asarray(image.resize((size, size), Image.Resampling.LANCZOS))
    half = supersample // 2
    labels = canvas.label.reshape(wide, wide)[half::supersample, half::supersample]
    points = landmarks(place, view, mesh) / supersample
    return image, labels, points


def _background(head, size, rng):
    color = np.broadcast_to(np.array(head.background, np.float32), (size, size, 3))
    color = color.copy()
    for cells in (3, 5):
        waves = [_noise(rng, size, cells) * 0.06 for _ in range(3)]
        color += np.stack(waves, -1) * head.backdrop
    return np.clip(color, 0, 1).reshape(-1, 3)


def _noise(rng, size, cells):
    """Smooth noise [size, size] of unit variance at `cells` cells a side."""
    image = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _lookup(texture, u, v):
    """Texture [n, n] at u, v in 0 .. 1, nearest."""
    n = len(texture)
    x = np.clip(u * n, 0, n - 1).astype(np.int32)
    return texture[np.clip(v * n, 0, n - 1).astype(np.int32), x]


def _ramp(x, start, end):
    """0 below `start`, 1 above `end`, linear between."""
    return np.clip((x - start) / (end - start), 0, 1)


def _bump(x, width):
    return np.exp(-((x / width) ** 2))


def rasterize(pixels, triangles, size, cull):
    """Nearest triangle of each covered pixel.

    pixels [vertices, 3], triangles [triangles, 3]; with `cull`, those that face away
    are skipped. Returns pixel index, triangle index, barycentric weights [n, 3], depth.
    """
    corners = pixels[triangles]
    low = np.maximum(np.ceil(corners[..., :2].min(1) - 0.5), 0).astype(np.int32)
    high = np.floor(corners[..., :2].max(1) - 0.5)
    high = np.minimum(high, size - 1).astype(np.int32)
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    e0 = b[:, 1] - c[:, 1]
    e1 = c[:, 0] - b[:, 0]
    e2 = c[:, 1] - a[:, 1]
    e3 = a[:, 0] - c[:, 0]
    area = e0 * e3 - e1 * e2  # positive: away from the camera, since y points down
    keep = (area < -1e-6) if cull else (np.abs(area) > 1e-6)
    span = high - low + 1
    index = np.nonzero(keep & (span > 0).all(1))[0]
    span = span[index]
    count = span[:, 0] * span[:, 1]
    t = np.repeat(index, count)
    offset = np.arange(len(t)) - np.repeat(np.cumsum(count) - count, count)
    width = np.repeat(span[:, 0], count)
    px = low[t, 0] + offset % width
    py = low[t, 1] + offset // width
    inverse = 1 / np.where(keep, area, 1)
    dx = px + np.float32(0.5) - c[t, 0]
    dy = py + np.float32(0.5) - c[t, 1]
    w0 = (e0[t] * dx + e1[t] * dy) * inverse[t]
    w1 = (e2[t] * dx + e3[t] * dy) * inverse[t]
    w2 = 1 - w0 - w1
    inside = np.nonzero((w0 >= -1e-5) & (w1 >= -1e-5) & (w2 >= -1e-5))[0]
    t = t[inside]
    weights = np.stack([w0[inside], w1[inside], w2[inside]], 1)
    place = py[inside] * size + px[inside]
    depth = (corners[t, :, 2] * weights).sum(1)
    # 16-bit depths sort in linear time; later writes win, so the nearest comes last.
    if len(depth):
        near, far = depth.max(), depth.min()
        steps = (depth - far) * (65535 / max(near - far, 1e-6))
        order = np.argsort(steps.astype(np.uint16), kind="stable")
    else:
        order = np.zeros(0, np.int64)
    winner = np.full(size * size, -1)
    winner[place[order]] = order
    found = np.nonzero(winner >= 0)[0]
    winner = winner[found]
    return found, t[winner], weights[winner], depth[winner]


class Painter:
    """Draws the parts of one head onto a canvas, back to front where it matters."""

    def __init__(self, mesh, head, place, view, canvas, style, rng):
        self.mesh, self.head, self.place = mesh, head, place
        self.view, self.canvas, self.style = view, canvas, style
        self.flat = style in ("cel", "duotone")
        self.light = np.array(head.light, np.float32)
        half = self.light + [0, 0, 1]
        self.half = (half / np.linalg.norm(half)).astype(np.float32)
        self.skin = np.array(head.skin, np.float32)
        self.hair = np.array(head.hair, np.float32)
        self.grain = _noise(rng, 512, 160)
        self.strands = _noise(rng, 512, 40) * 0.6 + _noise(rng, 512, 128) * 0.4

    def paint(self):
        head, place = self.head, self.place
        parts, vertices = self.mesh.parts, place.vertices
        hairy = head.hair_line != "none"
        cover = self.scalp_cover(0.10) if hairy else np.zeros(len(vertices))
        self.cover = cover.astype(np.float32)
        self.draw("skin", vertices, self.paint_skin, cull=True)
        self.draw("mouth", vertices, self.paint_teeth)
        self.draw("tongue", vertices, self.paint_tongue)
        self.draw("eye", vertices, self.paint_eye, cull=True)
        self.draw("lash", vertices, self.paint_lash, lift=0.005)
        normals = heads_mesh.normals(vertices, parts["clothes"])
        self.draw("clothes", vertices + normals * 0.02, self.paint_clothes)
        if hairy:
            if head.hair_length > 0:
                self.draw("curtain", vertices, self.paint_curtain)
            middle = place.center + np.array([0, 0.1, -0.6], np.float32)
            out = vertices - middle
            out /= np.linalg.norm(out, axis=1, keepdims=True) + 1e-6
            lift = self.scalp_cover(0.35) * head.hair_volume
            lift *= 0.6 + 0.7 * _ramp(out[:, 1], 0.2, 0.9)
            lift += 0.012 * self.cover
            shell = vertices + out * lift[:, None].astype(np.float32)
            self.draw("skin", shell, self.paint_scalp, cull=True, skip=self.cover == 0)

    def scalp_cover(self, soft):
        """How far inside the hair line a vertex is, 0 .. 1 over `soft` decimetres."""
        head, mesh = self.head, self.mesh
        angle, height = mesh.scalp[:, 0], mesh.scalp[:, 1]
        line = np.interp(angle, HAIR_ANGLES, HAIR_LINES[head.hair_line])
        front = _ramp(angle, 75, 20)
        side = mesh.vertices[:, 0]
        line = line + head.hair_shift * front
        if head.hair_line == "fringe":  # a parting to one side
            line = line + front * 0.5 * _bump(side - head.hair_part, 0.16) * 0.6
        return _ramp(height - line, 0, soft) * np.clip(1 - 2 * mesh.ears, 0, 1)

    def draw(self, name, vertices, paint, cull=False, lift=0.0, skip=None):
        """Rasterise a part and let `paint(points, normals, uv, cover)` colour it.

        `paint` returns colour [n, 3], opacity [n] and label [n] or a label name.
        """
        part, canvas = self.mesh.parts[name], self.canvas
        triangles, uv = part.vertices, part.uv
        if skip is not None:
            keep = ~skip[triangles].all(1)
            triangles, uv = triangles[keep], uv[keep]
        pixels = self.view.pixels(vertices)
        pixels[:, 2] += lift
        where, t, weights, depth = rasterize(pixels, triangles, canvas.size, cull)
        seen = np.nonzero(depth > canvas.depth[where])[0]
        where, t, weights, depth = where[seen], t[seen], weights[seen], depth[seen]
        if not len(where):
            return
        corners = triangles[t]
        weights = weights.astype(np.float32)[..., None]
        turned = heads_mesh.normals(vertices, part).astype(np.float32)
        turned = turned @ self.view.rotation.T
        normal = (turned[corners] * weights).sum(1)
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-9
        normal = np.where(normal[:, 2:] < 0, -normal, normal)
        points = (self.place.vertices[corners] * weights).sum(1)
        points = points - self.place.center
        spots = (self.mesh.uv[uv[t]] * weights).sum(1)
        cover = (self.cover[corners] * weights[..., 0]).sum(1)
        color, opacity, label = paint(points, normal, spots, cover)
        canvas.color[where] += (color - canvas.color[where]) * opacity[:, None]
        solid = opacity > 0.5
        canvas.depth[where[solid]] = depth[solid]
        label = np.broadcast_to(np.asarray(label, np.uint8), where.shape)
        canvas.label[where[solid]] = label[solid]

    def shade(self, normal, albedo, gloss=0.12):
        """Light a surface: ambient, a wrapped key light, a fill light, a highlight."""
        head = self.head
        facing = normal @ self.light
        if self.flat:
            bands = np.where(facing > 0.25, 1.08, np.where(facing > -0.15, 0.86, 0.66))
            grey = albedo.mean(1, keepdims=True)
            strong = np.clip((albedo - grey) * 1.5 + grey * 1.08, 0, 1)
            return strong * bands[:, None]
        wrapped = np.clip((facing + 0.35) / 1.35, 0, 1)
        shine = np.clip(normal @ self.half, 0, 1) ** 18
        away = np.array([-self.light[0], 0.1, 0.4], np.float32)
        fill = np.clip(normal @ away, 0, 1) * 0.12
        key = (1.15 - head.ambient * 0.6) * 0.75
        level = head.ambient * (0.75 + 0.25 * normal[:, 1]) + key * wrapped + fill
        gloss = np.broadcast_to(gloss, level.shape)
        color = albedo * level[:, None] + (gloss * shine)[:, None]
        return color * np.array(head.warmth, np.float32)

    def paint_skin(self, p, normal, uv, cover):
        head, mesh = self.head, self.mesh
        x, y, z = p.T
        color = np.broadcast_to(self.skin, p.shape)
        lips = np.clip(heads_mesh.look_up(mesh.masks["lips"], uv) * 1.2, 0, 1)
        lids = heads_mesh.look_up(mesh.masks["eyelids"], uv)
        ears = heads_mesh.look_up(mesh.masks["ears"], uv)
        cheeks = _bump(np.abs(x) - 0.42, 0.2) * _bump(y + 0.42, 0.22)
        nose = _bump(x, 0.15) * _bump(y + 0.42, 0.2) * (z > 0.2)
        red = (cheeks + 0.6 * nose) * (0.06 + head.blush)
        color = color * (1 - red[:, None] * np.array([0, 0.9, 0.8], np.float32))
        grain = _lookup(self.grain, uv[:, 0], uv[:, 1])
        color = color * (1 + 0.025 * grain)[:, None]
        color = color * (1 - 0.2 * lids[:, None] * np.array([0.6, 0.8, 0.8]))
        color = color + (np.array(head.lips) - color) * lips[:, None]
        brow = np.zeros(len(p), np.float32)
        width, length, arch, above = head.brow
        for eye in self.place.eyes:
            side = eye - self.place.center
            along = (x - side[0]) * np.sign(side[0])
            rise = y - side[1] - above - arch * (1 - ((along - 0.08) / 0.25) ** 2)
            thick = width * np.clip(1.1 - np.clip(along / length, 0, 1) * 0.8, 0.1, 1)
            shape = np.exp(-((rise / thick) ** 4)) * _ramp(along, -0.17, -0.12)
            brow += shape * (along < length) * (z > side[2] - 0.35)
        brow = np.clip(brow, 0, 1) * 0.8
        color = color + (self.hair * 0.85 - color) * brow[:, None]
        beard = np.zeros(len(p), np.float32)
        if head.beard > 0:
            jaw = _ramp(-0.62 - y + 0.35 * (np.abs(x) - 0.25), 0, 0.12)
            beard = jaw * (1 - lips) * _ramp(y, -1.75, -1.6) * (z > -1.1)
            color = color + (self.hair - color) * (
                beard * head.beard * (0.85 + 0.15 * np.tanh(grain))
            )[:, None].clip(0, 1)
        color = color + (self.hair * 0.9 - color) * cover[:, None]
        under = np.clip((-1.45 - y) / 0.3, 0, 1) * np.clip((0.1 - z) / 0.5, 0, 1)
        socket = _bump(np.abs(x) - 0.31, 0.18) * _bump(y - 0.06, 0.12)
        color = color * ((1 - 0.35 * under) * (1 - 0.22 * socket))[:, None]
        gloss = 0.10 * (1 - 0.5 * head.melanin) * (1 - cover) + 0.1 * lips
        label = np.full(len(p), SHARED["skin"])
        label[(y < -1.25) & (z < -0.1) | (y < -1.6)] = SHARED["neck"]
        label[ears > 0.5] = SHARED["ears"]
        label[beard * head.beard > 0.25] = SHARED["beard"]
        label[brow > 0.4] = SHARED["brows"]
        label[lips > 0.5] = SHARED["lips"]
        label[cover > 0.5] = SHARED["hair"]
        return self.shade(normal, color, gloss), np.ones(len(p)), label

    def paint_teeth(self, p, normal, uv, cover):
        color = self.shade(normal, np.full(p.shape, (0.88, 0.85, 0.78)), 0.1) * 0.8
        return color, np.ones(len(p)), SHARED["mouth"]

    def paint_tongue(self, p, normal, uv, cover):
        color = self.shade(normal, np.full(p.shape, (0.6, 0.25, 0.25)))
        return color, np.ones(len(p)), SHARED["mouth"]

    def paint_eye(self, p, normal, uv, cover):
        head = self.head
        left, right = (eye - self.place.center for eye in self.place.eyes)
        out = p - np.where(p[:, :1] > 0, left, right)
        rise = out[:, 1]
        out = out / np.linalg.norm(out, axis=1, keepdims=True)
        gaze = np.array([head.gaze[0] - np.sin(head.yaw) * 0.3, head.gaze[1], 1.0])
        angle = np.arccos(np.clip(out @ (gaze / np.linalg.norm(gaze)), -1, 1))
        iris = _ramp(-angle, -0.52, -0.47)[:, None]
        pupil = _ramp(-angle, -0.22, -0.18)[:, None]
        tint = np.array(head.iris) * (0.6 + 1.2 * angle)[:, None]
        color = np.full(p.shape, (0.86, 0.84, 0.82))
        color = color + (tint - color) * iris
        color = color + (0.02 - color) * pupil
        shine = np.clip(normal @ self.half, 0, 1) ** 250 * 0.9
        lid = 0.92 * (1 - 0.3 * _ramp(rise, 0.06, 0.16))
        color = self.shade(normal, color, 0.0) * lid[:, None] + shine[:, None]
        return color, np.ones(len(p)), SHARED["eyes"]

    def paint_lash(self, p, normal, uv, cover):
        opacity = np.full(len(p), 0.4 + 0.2 * (1 - self.head.male))
        return np.full(p.shape, 0.05), opacity, SHARED["eyes"]

    def paint_clothes(self, p, normal, uv, cover):
        color = self.shade(normal, np.broadcast_to(self.head.clothes, p.shape), 0.02)
        return color, (p[:, 1] < -2.05).astype(float), SHARED["clothes"]

    def hair_color(self, p, normal):
        """Lit hair: soft strands that run down the head, and a band of shine."""
        angle = np.arctan2(p[:, 0], -(p[:, 2] + 0.8))
        along = (angle + np.pi) / (2 * np.pi)
        strands = _lookup(self.strands, along, np.clip((p[:, 1] + 4) / 24, 0, 1))
        head = self.head
        facing = np.clip(normal @ self.light, 0, 1)
        if self.flat:
            level = np.where(facing > 0.3, 1.15, 0.8)
            return self.hair * (level * (1 + 0.06 * np.sign(strands)))[:, None], strands
        color = self.hair * (head.ambient + 0.8 * facing)[:, None]
        color = color * np.clip(1 + 0.14 * strands, 0.5, 1.5)[:, None]
        shine = np.exp(-(((normal[:, 1] - 0.45) / 0.22) ** 2)) * 0.22
        color = color + shine[:, None] * (0.5 * self.hair + 0.1)
        return color * np.array(head.warmth, np.float32), strands

    def paint_scalp(self, p, normal, uv, cover):
        color, strands = self.hair_color(p, normal)
        return color, _ramp(cover + 0.12 * strands, 0.15, 0.6), SHARED["hair"]

    def paint_curtain(self, p, normal, uv, cover):
        color, strands = self.hair_color(p, normal)
        length = self.head.hair_length
        ends = _ramp(p[:, 1] + 0.15 * strands, -length - 0.05, -length + 0.05)
        shade = 0.75 + 0.25 * _ramp(p[:, 1], -1.2, 0.4)
        shade *= 0.4 + 0.6 * _ramp(p[:, 2], -1.5, -0.7)  # behind the neck
        return color * shade[:, None], ends, SHARED["hair"]


def _stylize(image, depth, style, supersample, rng):
    """Turn a drawing [size, size, 3] in 0 .. 1 into one of the drawn styles."""
    grey = image @ np.array([0.3, 0.6, 0.1])
    if style == "paint":
        return _paint(image, grey, supersample)
    edges = _edges(ndimage.gaussian_filter(depth, 1.0))
    if style == "pencil":
        return _pencil(grey, edges, depth > -2.9, rng)
    tones = _edges(ndimage.gaussian_filter(grey, 1.2))
    lines = np.clip(edges / 1.5 - 0.25, 0, 1) + np.clip(tones / 0.55 - 0.3, 0, 1)
    lines = ndimage.gaussian_filter(np.clip(lines, 0, 1), 0.4 * supersample) * 1.4
    lines = np.clip(lines, 0, 1)[..., None]
    if style == "duotone":
        inks = (
            (0.10, 0.55, 0.98, 1.0),
            (0.05, 0.15, 0.55, 0.95),
            (0.3, 0.35, 0.35, 0.7),
        )
        levels = [np.interp(grey, (0, 0.35, 0.6, 1), ink) for ink in inks]
        image = np.stack(levels, -1)
    return image * (1 - lines) + np.array([0.08, 0.04, 0.08]) * lines


def _edges(plane):
    return np.hypot(ndimage.sobel(plane, 0), ndimage.sobel(plane, 1))


def _pencil(grey, edges, figure, rng):
    size = len(grey)
    smooth = ndimage.gaussian_filter
    lines = np.clip((smooth(grey, 4.0) - smooth(grey, 1.0)) * 16, 0, 1)
    lines = lines + np.clip(edges / 2 - 0.2, 0, 1) * 0.8
    strokes = rng.standard_normal((2 * size, 2 * size))
    strokes = ndimage.rotate(
        ndimage.gaussian_filter1d(strokes, 9, axis=1), 40, reshape=False, order=1
    )
    half = size // 2
    strokes = strokes[half : half + size, half : half + size] * 4
    shadow = np.clip(0.62 - grey, 0, 1) * 1.3 * figure
    tone = lines * 0.85 + shadow * np.clip(0.6 + 0.5 * strokes, 0, 1)
    tone = np.clip(tone, 0, 1)[..., None] * 0.85
    return np.array([0.97, 0.95, 0.90]) - tone * np.array([1, 1, 0.98])


def _paint(image, grey, supersample):
    """Kuwahara filter: each pixel takes the mean of its calmest neighbourhood."""
    side = 2 * supersample + 1
    mean = ndimage.uniform_filter(image, (side, side, 1))
    spread = (
        ndimage.uniform_filter(grey**2, side) - ndimage.uniform_filter(grey, side) ** 2
    )
    reach = side // 2
    moves = [(dy, dx) for dy in (-reach, reach) for dx in (-reach, reach)]
    means = np.stack([_shift(mean, move) for move in moves])
    best = np.stack([_shift(spread, move) for move in moves]).argmin(0)
    image = np.take_along_axis(means, best[None, ..., None], 0)[0]
    image = np.clip((image - 0.5) * 1.25 + 0.5, 0, 1)
    return image * np.array([1.08, 0.98, 0.80])


def _shift(plane, move):
    """Shift by (dy, dx), repeating the border."""
    pad = [(max(m, 0), max(-m, 0)) for m in move] + [(0, 0)] * (plane.ndim - 2)
    padded = np.pad(plane, pad, mode="edge")
    rows = slice(pad[0][1], pad[0][1] + plane.shape[0])
    columns = slice(pad[1][1], pad[1][1] + plane.shape[1])
    return padded[rows, columns]
