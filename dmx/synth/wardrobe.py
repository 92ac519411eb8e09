"""Who a person is: body shape, the cut of the clothes, hair and bag, drawn from the person's key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from dmx.synth.body import Phenotype
from dmx.synth.styles import Wardrobe

Lower = Literal["trousers", "shorts", "skirt", "dress"]
Hair = Literal["bald", "buzz", "short", "full", "afro"]
HairExtra = Literal["none", "long", "bun", "ponytail"]
Headwear = Literal["none", "beanie", "cap", "scarf"]
Bag = Literal["none", "backpack", "shoulder", "hand"]


@dataclass(frozen=True)
class Outfit:
    """The cut of everything worn. Lengths along an arm or leg are 0 at the joint, 1 at wrist or ankle."""

    female: bool
    sleeve: float
    coat: bool
    lower: Lower
    tights: bool
    leg_length: float
    waist_above_hip_m: float
    hem_above_hip_m: float
    collar_m: float
    neckline_m: float
    skirt_length: float
    coat_length: float
    top_ease_m: float
    leg_ease_m: float
    flare_m: float
    shoe_height: float
    hair: Hair
    hair_extra: HairExtra
    headwear: Headwear
    bag: Bag
    bag_size: float
    bag_left: bool


def draw_phenotype(rng: np.random.Generator) -> Phenotype:
    """A body shape: adults of all builds, now and then a teenager."""

    def near(mean: float, spread: float, low: float, high: float) -> float:
        return float(np.clip(rng.normal(mean, spread), low, high))

    female = rng.random() < 0.5
    origin = rng.dirichlet([0.5, 0.5, 0.5])
    return Phenotype(
        gender=near(0.9 if female else 0.1, 0.08, 0.0, 1.0),
        age=float(rng.uniform(0.58, 0.98) if rng.random() > 0.06 else rng.uniform(0.47, 0.58)),
        muscle=near(0.5, 0.17, 0.05, 0.95),
        weight=near(0.5, 0.2, 0.05, 0.98),
        height=near(0.5, 0.17, 0.05, 0.95),
        proportions=float(rng.uniform(0.3, 0.9)),
        cup=float(rng.uniform(0.2, 0.7)),
        origin=(float(origin[0]), float(origin[1]), float(origin[2])),
    )


def draw_outfit(rng: np.random.Generator, wardrobe: Wardrobe, phenotype: Phenotype) -> Outfit:
    """Choose what a person of this build wears in a style."""
    female = phenotype.gender > 0.5
    chance = rng.random
    coat = chance() < wardrobe.coats
    lower = _draw_lower(rng, wardrobe, female)
    if coat and lower == "dress":
        lower = "skirt"  # a dress has the cloth of the top, and that is the coat's here
    tucked = chance() < 0.2
    waist = rng.uniform(0.06, 0.12)
    headwear = _draw_headwear(rng, wardrobe, female)
    hair, hair_extra = _draw_hair(rng, female, headwear, phenotype.origin[0])
    return Outfit(
        female=female,
        sleeve=_draw_sleeve(rng, wardrobe, coat),
        coat=coat,
        lower=lower,
        tights=lower in ("skirt", "dress") and chance() < 0.5,
        leg_length=float(rng.uniform(0.35, 0.6) if lower == "shorts" else rng.uniform(0.9, 1.02)),
        waist_above_hip_m=float(waist),
        hem_above_hip_m=float(waist - 0.02 if tucked and not coat else rng.uniform(-0.1, 0.02)),
        collar_m=float(rng.uniform(-0.035, 0.03) + 0.03 * coat),
        neckline_m=float(rng.uniform(0, 0.12) if chance() < 0.4 else 0.0),
        skirt_length=float(rng.uniform(0.3, 0.95)),
        coat_length=float(rng.uniform(0.18, 0.6)),
        top_ease_m=float(rng.uniform(0.008, 0.022) + 0.014 * coat),
        leg_ease_m=float(rng.uniform(0.006, 0.014)),
        flare_m=float(rng.uniform(0, 0.022) if chance() < 0.6 else 0.0),
        shoe_height=float(rng.uniform(0.9, 0.97) if chance() < 0.75 else rng.uniform(0.6, 0.85)),
        hair=hair,
        hair_extra=hair_extra,
        headwear=headwear,
        bag=_draw_bag(rng, wardrobe),
        bag_size=float(rng.uniform(0.8, 1.2)),
        bag_left=bool(chance() < 0.5),
    )


def _draw_sleeve(rng: np.random.Generator, wardrobe: Wardrobe, coat: bool) -> float:
    if coat:
        return 1.0
    kind = rng.random()
    if kind < 0.05:
        return 0.06
    return float(rng.uniform(0.22, 0.42) if rng.random() < wardrobe.short_sleeves else rng.uniform(0.92, 1.0))


def _draw_lower(rng: np.random.Generator, wardrobe: Wardrobe, female: bool) -> Lower:
    if female and rng.random() < wardrobe.skirts:
        return "dress" if rng.random() < 0.4 else "skirt"
    return "shorts" if rng.random() < wardrobe.shorts else "trousers"


def _draw_headwear(rng: np.random.Generator, wardrobe: Wardrobe, female: bool) -> Headwear:
    if rng.random() < wardrobe.hats:
        return "cap" if rng.random() < 0.6 else "beanie"
    return "scarf" if female and rng.random() < wardrobe.scarves else "none"


def _draw_hair(
    rng: np.random.Generator, female: bool, headwear: Headwear, african: float
) -> tuple[Hair, HairExtra]:
    kinds: tuple[Hair, ...] = ("buzz", "short", "full", "afro")
    weights = np.array([0.02 if female else 0.2, 0.45, 0.35 - 0.25 * african, 0.25 * african])
    hair = kinds[rng.choice(4, p=weights / weights.sum())]
    extra: HairExtra = "none"
    long_hair = rng.random() < (0.65 if female else 0.04)
    if long_hair:
        extra = "long"
    elif female:
        extra = "bun" if rng.random() < 0.5 else "ponytail"
    if not female and rng.random() < 0.1:
        hair, extra = "bald", "none"
    if headwear != "none":
        extra = "none"
    return hair, extra


def _draw_bag(rng: np.random.Generator, wardrobe: Wardrobe) -> Bag:
    kinds: tuple[Bag, ...] = ("backpack", "shoulder", "hand")
    if rng.random() >= wardrobe.bags:
        return "none"
    return kinds[rng.choice(3, p=np.array(wardrobe.bag_weights) / sum(wardrobe.bag_weights))]
