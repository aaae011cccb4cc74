"""What `train.heads` draws at random: shape, expression, colours and hair of a head.

A head is a dataclass of plain numbers, so that it can be written beside its picture and
drawn again: in another style, at another size, or turned.
"""

import dataclasses

import numpy as np

from train import heads_mesh

ANCESTRIES = ("african", "asian", "caucasian")
FEATURES = (
    "head",
    "nose",
    "eyes",
    "mouth",
    "chin",
    "cheek",
    "eyebrows",
    "forehead",
    "ears",
)
SKIN = np.array([[0.93, 0.73, 0.62], [0.78, 0.55, 0.41], [0.33, 0.20, 0.14]])
HAIR = np.array(
    [
        [0.06, 0.045, 0.04],
        [0.16, 0.09, 0.05],
        [0.32, 0.19, 0.09],
        [0.72, 0.55, 0.30],
        [0.45, 0.17, 0.07],
        [0.62, 0.61, 0.60],
    ]
)
IRIS = np.array(
    [[0.25, 0.14, 0.07], [0.35, 0.24, 0.10], [0.25, 0.42, 0.60], [0.32, 0.42, 0.25]]
)
# Hair lines: heights above the eyes, in decimetres, at these angles around the head
# (0 is the nose, 90 the ear, 180 the nape).
HAIR_ANGLES = (0, 20, 38, 55, 72, 88, 104, 125, 150, 180)
HAIR_LINES = {
    "round": (0.74, 0.74, 0.68, 0.50, 0.16, -0.12, 0.14, -0.35, -0.75, -0.85),
    "receding": (0.86, 0.92, 0.90, 0.62, 0.26, -0.05, 0.18, -0.30, -0.70, -0.80),
    "fringe": (0.40, 0.40, 0.40, 0.38, 0.02, -0.18, 0.10, -0.40, -0.80, -0.90),
}


@dataclasses.dataclass(frozen=True)
class Head:
    """One head: shape target weights, pose in radians, light, colours (RGB 0 .. 1)."""

    seed: int
    index: int
    male: float
    age: float
    melanin: float
    targets: dict
    yaw: float
    pitch: float
    roll: float
    zoom: float
    skin: tuple
    lips: tuple
    hair: tuple
    iris: tuple
    clothes: tuple
    background: tuple
    backdrop: float
    light: tuple
    ambient: float
    warmth: tuple
    blush: float
    gaze: tuple
    brow: tuple
    beard: float
    hair_line: str
    hair_shift: float
    hair_part: float
    hair_volume: float
    hair_length: float


def sample(mesh, seed, index):
    """Head number `index` of the random series `seed`; nothing else decides it."""
    rng = np.random.default_rng([seed, index])
    ancestry = rng.dirichlet([0.6, 0.6, 0.6])
    male = float(rng.beta(0.5, 0.5))
    age = float(rng.beta(1.2, 1.6))
    targets = _shape(mesh, rng, ancestry, male, age)
    _expression(rng, targets)
    melanin = ancestry @ [0.75, 0.3, 0.15] + rng.normal() * 0.1
    melanin = float(np.clip(melanin, 0.02, 0.98))
    skin = np.array([np.interp(melanin, (0, 0.5, 1), SKIN[:, c]) for c in range(3)])
    skin = skin * (1 + rng.normal(size=3) * 0.03)
    lips = skin * [0.92, 0.66, 0.64] * (1 - 0.2 * (1 - male) * rng.random())
    odds = np.array([0.8, 0.2, 0, 0, 0, 0.0])
    if melanin < 0.45:
        odds = np.array([0.3, 0.27, 0.2, 0.15, 0.08, 0.0])
    odds[5] = max(0.0, age - 0.45)
    hair = HAIR[rng.choice(6, p=odds / odds.sum())] * (1 + rng.normal() * 0.12)
    odds = (0.45, 0.2, 0.2, 0.15) if melanin < 0.4 else (0.85, 0.15, 0, 0)
    iris = IRIS[rng.choice(4, p=odds)]
    light = np.array([rng.normal() * 0.6, 0.4 + 0.3 * rng.random(), 0.8])
    background = rng.uniform(0.1, 0.85) + rng.normal(size=3) * 0.09
    bald = male > 0.6 and rng.random() < 0.12
    line = ("round", "receding", "fringe")[
        rng.choice(3, p=(0.45, 0.4, 0.15) if male > 0.5 else (0.5, 0.1, 0.4))
    ]
    lengths = (0.0, 0.55, 1.3, 2.8)  # below the eyes; 0 is short all round
    odds = (0.9, 0.04, 0.04, 0.02) if male > 0.5 else (0.2, 0.15, 0.3, 0.35)
    return Head(
        seed=seed,
        index=index,
        male=male,
        age=age,
        melanin=melanin,
        targets=targets,
        yaw=float(rng.normal() * 0.22),
        pitch=float(0.06 + rng.normal() * 0.08),
        roll=float(rng.normal() * 0.05),
        zoom=float(rng.uniform(0.97, 1.03)),
        skin=_numbers(np.clip(skin, 0, 1)),
        lips=_numbers(np.clip(lips + np.array([0.08, 0, 0.02]) * (1 - male), 0, 1)),
        hair=_numbers(hair),
        iris=_numbers(iris),
        clothes=_numbers(rng.random(3) * 0.8 + 0.05),
        background=_numbers(np.clip(background, 0.03, 1)),
        backdrop=float(rng.random()),
        light=_numbers(light / np.linalg.norm(light)),
        ambient=float(rng.uniform(0.35, 0.6)),
        warmth=_numbers(1 + rng.normal(size=3) * 0.05),
        blush=float(rng.random() * 0.12),
        gaze=_numbers(rng.normal(size=2) * 0.06),
        brow=_numbers(
            (
                rng.uniform(0.018, 0.04),
                rng.uniform(0.24, 0.30),
                rng.uniform(0.02, 0.07),
                rng.uniform(0.185, 0.225),
            )
        ),
        beard=float(rng.uniform(0.3, 0.85) * (male > 0.6) * (rng.random() < 0.35)),
        hair_line="none" if bald else line,
        hair_shift=float(rng.uniform(-0.06, 0.06)),
        hair_part=float(rng.normal() * 0.3),
        hair_volume=float(rng.uniform(0.03, 0.16)),
        hair_length=float(lengths[rng.choice(4, p=odds)] * rng.uniform(0.85, 1.15)),
    )


def _numbers(values):
    return tuple(round(float(v), 6) for v in values)


def _shape(mesh, rng, ancestry, male, age):
    """Weights of the macro targets and of about half of the feature targets."""
    targets = {}
    weight = rng.beta(2, 2)
    weights = {
        "minweight": max(0.0, 1 - 2 * weight),
        "averageweight": 1 - abs(2 * weight - 1),
        "maxweight": max(0.0, 2 * weight - 1),
    }
    for sex, of_sex in (("male", male), ("female", 1 - male)):
        for years, of_age in (("young", 1 - age), ("old", age)):
            share = of_sex * of_age
            for name, part in zip(ANCESTRIES, ancestry, strict=True):
                targets[f"macrodetails/{name}-{sex}-{years}"] = share * part
            for name, part in weights.items():
                name = f"macrodetails/universal-{sex}-{years}-averagemuscle-{name}"
                if part > 0 and heads_mesh.has_target(mesh, name):
                    targets[name] = share * part
    for group in FEATURES:
        choices = {}
        for name in heads_mesh.target_names(mesh, group):
            word = name.split("/")[1]
            # Moving the whole head only moves the crop; the right side follows the
            # left one.
            if word.startswith(("r-", "head-trans")):
                continue
            choices.setdefault(name.rsplit("-", 1)[0], []).append(name)
        for names in choices.values():
            if rng.random() < 0.5:
                name = names[rng.integers(len(names))]
                amount = min(abs(rng.normal()) * 0.35, 0.75)
                targets[name] = amount * (0.5 if group == "ears" else 1)
                if "/l-" in name:
                    targets[name.replace("/l-", "/r-")] = targets[name]
    return {name: round(float(w), 5) for name, w in targets.items()}


def _expression(rng, targets):
    def both(name, weight):
        for side in ("Left", "Right"):
            targets[name + side] = round(float(weight), 5)

    mood = rng.random()
    jaw, amounts = 0.0, rng.random(8)
    if mood < 0.55:
        both("mouthSmile", 0.2 + 0.7 * amounts[0])
    if mood < 0.25:
        jaw = 0.05 + 0.2 * amounts[1]
        both("mouthUpperUp", 0.5 * amounts[2])
    elif 0.55 < mood < 0.65:
        both("mouthFrown", 0.1 + 0.5 * amounts[0])
    elif 0.65 < mood < 0.75:
        jaw = 0.1 + 0.4 * amounts[1]
    if jaw:
        targets["jawOpen"] = round(float(jaw), 5)
    if rng.random() < 0.4:
        targets["browInnerUp"] = round(float(0.7 * amounts[3]), 5)
    if rng.random() < 0.3:
        both("browDown", 0.5 * amounts[4])
    if rng.random() < 0.3:
        both("eyeSquint", 0.5 * amounts[5])
    if rng.random() < 0.4:
        both("eyeWide", 0.6 * amounts[6])
    both("eyeBlink", 0.12 * amounts[7])
