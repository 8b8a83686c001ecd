"""Configuration of a study: data sets, targets, train sizes, seeds, arms and their sweeps. Typed, like ``config``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from cdssl_dist.config import Section
from cdssl_dist.finetune.targets import Target
from cdssl_dist.model.heads import ReadoutName


class SplitColumn(Section):
    """Choose crystals for training and evaluation by a column; "{target}" in its name stands for the target."""

    column: str
    train: str = "train"
    evaluate: str = "val"
    predict: str = "test"  # only for ``predict``: labels of these crystals are never read

    @model_validator(mode="after")
    def _apart(self) -> SplitColumn:
        if len({self.train, self.evaluate, self.predict}) < 3:
            raise ValueError(
                f"train, evaluate and predict must be three different values, not {self.train!r}, {self.evaluate!r} "
                f"and {self.predict!r}; labels of crystals to predict are never read"
            )
        return self


class Folds(Section):
    """Folds over the rows of the file as scikit-learn's ``KFold(k, shuffle=True, random_state=seed)`` makes them.

    With seed 18012019 these are the official folds of Matbench v0.1. Seed i of the study is evaluated on fold i mod k.
    """

    rows: PositiveInt  # of the file, those of refused crystals included
    k: int = Field(5, ge=2)
    seed: int = 18012019


class Shares(Section):
    """A share of the crystals is evaluated, the others may train; twins, or crystals of one formula, stay together."""

    evaluate: float = Field(0.2, gt=0, lt=1)
    seed: int = 0


class StudyData(Section):
    """A data set. Its path is given on the command line or by CDSSL_DATA_<NAME>."""

    column: str = "{target}"  # the column of the labels
    split: SplitColumn | Folds | Shares = Shares()


class StudyTarget(Section):
    """A property to learn."""

    data: str  # name of the data set
    unit: str = ""
    column: str | None = None  # overrides the data set's pattern
    extensive: bool = False  # grows with the cell: learned and reported per atom; files of predictions hold totals
    log: bool = False  # positive, with a long tail: its logarithm is learned; errors stay in the unit
    sizes: tuple[PositiveInt, ...] | None = None  # numbers of training labels; None: the study's

    def learned(self, name: str) -> Target:
        """The target for fine-tuning; the labels of an extensive one are already per atom."""
        return Target(name, self.unit, log=self.log)


Part = Literal["element", "initial_state", "input_x", "input_u", "input_s", "blocks"]  # of an encoder


class Arm(Section):
    """One way to start and train a network."""

    start: Literal["pretrained", "random", "permuted"]  # permuted: pretrained weights shuffled inside each tensor
    encoder: str | None = None  # models:/NAME@ALIAS or a folder; None: the study's
    parts: tuple[Part, ...] = ()  # keep the pretrained weights of these, and start the others anew; empty: keep all
    frozen: bool = False  # only the readout is trained
    readout: ReadoutName = "set2set"
    sizes: tuple[PositiveInt, ...] | None = None  # run at only these of the target's sizes, e.g. for a control
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)  # learning rates to choose from

    @model_validator(mode="after")
    def _parts_of_something(self) -> Arm:
        if self.parts and self.start != "pretrained":
            raise ValueError(f"parts: these are of pretrained weights, but start is {self.start}")
        if self.readout == "linear":
            raise ValueError("readout: linear is solved and has no rates to choose among; make it one of the probes")
        return self


class Probe(Section):
    """A ridge on vectors of crystals, with the same labels as the arms: nothing is trained, and no rate is chosen."""

    vectors: str  # Parquet with key and embedding, as `cdssl embed` writes it, with every crystal that takes part
    composition: bool = False  # add element fractions and the volume per atom to the features


class Training(Section):
    """The budget of one training, the same for all arms."""

    passes: PositiveInt = 24_000  # crystals seen over all epochs, within the bounds on epochs
    epochs: tuple[PositiveInt, PositiveInt] = (10, 100)  # fewest and most
    batch_size: PositiveInt = 16
    hold: float = Field(0.0, ge=0, lt=1)  # share of the labels that are held out for early stopping
    patience: PositiveInt = 30  # epochs
    compile: bool = False  # by torch, for long trainings
    weight_decay: float = Field(1e-5, ge=0)

    def epochs_of(self, crystals: int) -> int:
        """Number of epochs for this many training crystals."""
        return int(min(max(-(-self.passes // crystals), self.epochs[0]), self.epochs[1]))


class Sweep(Section):
    """How the learning rate of each arm is chosen, for each target at some sizes."""

    seeds: tuple[NonNegativeInt, ...] = Field((1000,), min_length=1)  # not reported ones; all rates run on the first
    finalists: PositiveInt = 2  # the best rates on the first seed, which run on the others as well
    sizes: tuple[PositiveInt, ...] = (100, 500, 2000)  # a case takes the rate of the nearest size, by its logarithm
    evaluate: PositiveInt = 500  # crystals, from the training pool but outside the sample


class Predict(Section):
    """Training on all crystals that may train, and predictions for those whose labels are secret."""

    targets: tuple[str, ...]
    arms: tuple[str, ...] = ("pretrained",)
    seeds: tuple[NonNegativeInt, ...] = (0,)
    training: Training = Training(passes=600_000, batch_size=32, hold=0.02)
    without_graph: Literal["omit", "median"] = "omit"  # a crystal without a graph gets no line, or the median label


class StudyTracking(Section):
    """MLflow."""

    uri: str | None = None  # MLFLOW_TRACKING_URI, else a SQLite file beside the study
    experiment: str = "cdssl-study"


class StudyConfig(Section):
    """One study."""

    out: str = "runs/study"
    encoder: str = "models:/cdssl-encoder@champion"
    data: dict[str, StudyData]
    targets: dict[str, StudyTarget]
    sizes: tuple[PositiveInt, ...] = (50, 100, 200, 350, 500, 1000, 2000)
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    arms: dict[str, Arm] = Field(default_factory=dict)
    probes: dict[str, Probe] = Field(default_factory=dict)
    reference: str = "scratch"  # what the others are compared with: an arm, a probe, or a baseline
    baselines: bool = True  # median, and ridge on element fractions
    evaluate_at_most: PositiveInt = 1000  # crystals of a target, the same in every case
    unseen_only: bool = False  # leave out, everywhere, crystals whose formula was seen in pretraining
    training: Training = Training()
    sweep: Sweep = Sweep()
    predict: Predict | None = None
    tracking: StudyTracking = StudyTracking()

    @property
    def sweeps(self) -> bool:
        """Whether an arm has rates to choose among."""
        return any(len(set(arm.rates)) > 1 for arm in self.arms.values())

    def sizes_of(self, target: str) -> tuple[int, ...]:
        """The train sizes of a target, ascending."""
        own = self.targets[target].sizes
        return tuple(sorted(set(self.sizes if own is None else own)))

    @property
    def others(self) -> tuple[str, ...]:
        """Names of what is compared without training a network: probes and baselines."""
        return (*self.probes, *(BASELINES if self.baselines else ()))

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        for name, target in self.targets.items():
            if target.data not in self.data:
                raise ValueError(f"targets.{name}.data: no data set {target.data!r}; there are {', '.join(self.data)}")
        named = (*self.arms, *self.others)
        if self.reference not in named:
            raise ValueError(f"reference: no arm {self.reference!r}; there are {', '.join(named)}")
        if self.reference in self.arms and self.arms[self.reference].sizes is not None:
            raise ValueError(f"arms.{self.reference}.sizes: the reference must run at every size")
        first = self.reference if self.reference in self.arms else next(iter(self.arms), "")
        for name, arm in self.arms.items():
            if not arm.rates or min(arm.rates) <= 0:
                raise ValueError(f"arms.{name}.rates: give one or more positive rates")
            if len(set(arm.rates)) != len(self.arms[first].rates):
                raise ValueError(
                    f"arms.{name}.rates: {len(set(arm.rates))} rates where {first} has "
                    f"{len(self.arms[first].rates)}; an arm with more rates to choose from has an advantage"
                )
        for name in [*self.arms, *self.probes]:
            if name in BASELINES:
                raise ValueError(f"{name}: this name is reserved for a baseline")
            if name in self.arms and name in self.probes:
                raise ValueError(f"probes.{name}: an arm has the same name")
        reported = {*self.seeds, *(self.predict.seeds if self.predict else ())}
        if both := reported & set(self.sweep.seeds):
            raise ValueError(f"sweep.seeds: {sorted(both)} are reported seeds, too; rates must be chosen on others")
        if self.training.epochs[0] > self.training.epochs[1]:
            raise ValueError("training.epochs: the smaller number comes first")
        if self.predict:
            for what, there in ((self.predict.targets, self.targets), (self.predict.arms, self.arms)):
                if strange := set(what) - set(there):
                    raise ValueError(f"predict: {', '.join(sorted(strange))} not in the study")
            for name in self.predict.targets:
                if not isinstance(self.data[self.targets[name].data].split, SplitColumn):
                    raise ValueError(f"predict: {name} needs a split column, which marks crystals with secret labels")
        return self


BASELINES = {"median": "median", "ridge": "ridge on composition"}  # arm → its name in ``baselines``
