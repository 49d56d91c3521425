"""RunConfig: everything a run depends on, as one tree of frozen, typed settings.

First link of the pipeline: `config_file.py` fills it from YAML, every other module reads it.
Invariant: settings only, no behaviour beyond what follows from a few of them. The string under each
field is its help text (`disttrain keys` prints it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

METHODS_WITH_CLASS_WORD = ("lora", "dreambooth")


@dataclass(frozen=True)
class PriorSettings:
    """Prior preservation (Ruiz et al. 2022): pictures of the class keep the class as it was."""

    num_class_images: int = 0
    """Class pictures to train beside the subject's; 0 means no prior preservation. When the
    subject's class_images folder holds fewer, the base model draws the rest."""
    prior_loss_weight: float = 1.0
    """Weight of the class pictures' loss beside the subject's."""
    class_guidance_scale: float = 7.5
    """Guidance scale for class pictures that the base model draws."""
    class_infer_steps: int = 40
    """Denoising steps for class pictures that the base model draws."""


@dataclass(frozen=True)
class TextualInversionSettings:
    """New token vectors for the text encoder; nothing else changes (Gal et al. 2022)."""

    name: Literal["textual_inversion"] = "textual_inversion"
    """Which method; textual_inversion learns vectors for one new token per subject."""
    num_vectors: int = 1
    """Vectors that the new token stands for, 1 to 75."""
    init_text: str = "*"
    """Words whose vectors the new ones start from, spread over num_vectors; empty means zeros."""


@dataclass(frozen=True)
class LoraSettings(PriorSettings):
    """Low-rank changes to the attention layers (Hu et al. 2021)."""

    name: Literal["lora"] = "lora"
    """Which method; lora learns a small file of low-rank changes per subject."""
    rank: int = 8
    """Rank of each change; higher learns more detail and makes a larger file."""
    alpha: float = 8.0
    """Scale of the change is alpha / rank; alpha = rank leaves it at 1."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear layers of the UNet that get a change, by the end of their name."""
    train_text_encoder: bool = False
    """Also change the text encoder."""
    text_encoder_target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Linear layers of the text encoder that get a change, by the end of their name."""


@dataclass(frozen=True)
class DreamboothSettings(PriorSettings):
    """The whole UNet learns the subject (Ruiz et al. 2022); the result is a complete model."""

    name: Literal["dreambooth"] = "dreambooth"
    """Which method; dreambooth trains the model itself, one subject at a time."""
    train_text_encoder: bool = False
    """Also train the text encoder."""


@dataclass(frozen=True)
class FinetuneSettings:
    """The whole UNet learns a captioned set; no new word, no class pictures."""

    name: Literal["finetune"] = "finetune"
    """Which method; finetune trains the model itself on captioned pictures."""
    train_text_encoder: bool = False
    """Also train the text encoder."""


MethodSettings = TextualInversionSettings | LoraSettings | DreamboothSettings | FinetuneSettings


@dataclass(frozen=True)
class SubjectSettings:
    """One result to make: its pictures and the words that will mean it."""

    name: str
    """Name of the result; the files are subjects/NAME/NAME.safetensors."""
    images: str
    """A folder of pictures, or the index.json of tar shards: a path, or a URL that begins with
    file, http, https, s3 or gs."""
    token: str = ""
    """The word that will mean the subject; for textual inversion the name of the new token.
    finetune needs none."""
    class_name: str = ""
    """What kind of thing it is, in the base model's words: fox, dog, person."""
    instance_prompt: str = ""
    """Training prompt with {token}, {class_name}, {caption}; empty: the method's usual one."""
    template: str = ""
    """File of training prompts, a line each, with [name] and [filewords]; instead of
    instance_prompt. Looked up as a path, then in templates/."""
    class_images: str = ""
    """Class pictures for prior preservation, given as images are; drawn ones go to
    output_dir/.cache."""
    class_prompt: str = "a photo of {class_name}"
    """Prompt for class pictures, when training on them and when the base model draws them."""
    held_out: str = ""
    """Pictures of the subject that training does not see, given as images are, for `disttrain
    score`; empty: the training pictures, which also reward copying them."""


@dataclass(frozen=True)
class DataSettings:
    """How pictures become batches."""

    resolution: int = 512
    """Side of the square training pictures in pixels; a multiple of 8."""
    batch_size: int = 1
    """Pictures of one subject per step, process and accumulation step."""
    global_batch_size: int | None = None
    """Pictures of one subject per optimizer step over all processes. Given, it settles
    gradient_accumulation_steps (and lowers batch_size where it must); empty: processes x batch_size
    x gradient_accumulation_steps of the first start. A run keeps it on any number of processes."""
    center_crop: bool = True
    """Crop the middle of pictures that are not square; false draws the place of the crop."""
    cached_crops: int = 4
    """With center_crop false and cache_latents: different crops kept per picture, one drawn each
    time it is seen. Without the cache each crop is drawn afresh."""
    random_flip: bool = False
    """Mirror each picture left to right with probability one half."""
    latent_sampling: Literal["random", "deterministic", "once"] = "random"
    """Sample of the autoencoder's posterior: drawn afresh each time, its mean, or drawn once."""
    aspect_ratio_buckets: bool = False
    """Train pictures at a size of their own aspect ratio (area about resolution squared) instead of
    cropping them to squares; each optimizer step holds pictures of one size."""
    bucket_step: int = 64
    """Sides of buckets are multiples of this many pixels."""
    bucket_max_aspect: float = 2.0
    """Longest side of a bucket over its shortest; pictures beyond are cropped."""
    cache_latents: bool = True
    """Encode every picture once, before training, and keep the result for all runs; false decodes
    and encodes pictures while training."""
    latent_precision: Literal["float32", "float16"] = "float32"
    """How cached latents are stored; float16 halves their size."""
    cache_text: bool = True
    """Keep encoded prompts on disk where the text encoder is not trained and prompts are fixed."""
    num_workers: int | None = None
    """Processes that decode pictures ahead of training without cached latents; empty: 2.
    With cached latents: threads that decode ahead of the encoder."""
    epoch_end: Literal["auto", "wrap", "drop"] = "auto"
    """What becomes of pictures that do not fill the last step of an epoch: wrap fills it with the
    next epoch's first ones, drop leaves them out; auto wraps sets of under 10000 pictures."""
    shuffle_window: int = 50_000
    """Pictures that are shuffled together, after their shards were; larger sets then read their
    shards nearly in sequence. 0: the whole set."""
    max_damaged: float | None = None
    """Share of pictures that may be damaged and passed over before the run stops; empty: 0.01, and
    none for under 100 pictures."""
    shard_cache_gb: float = 20.0
    """Disk space for shards fetched from URLs, in GB; the least recently used leave first."""


@dataclass(frozen=True)
class CaptionSettings:
    """What the words of a picture are, and how they vary from draw to draw."""

    column: str = ""
    """Column of a folder's metadata.jsonl or metadata.csv that holds captions; empty: text, else
    caption. A same-stem .txt goes before it."""
    filename_pattern: str = ""
    """For pictures without a caption: regular expression whose matches in the file name are the
    caption's words; empty: the name without leading numbers."""
    filename_join: str = " "
    """What stands between the matches of filename_pattern."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated tags of a caption at each draw."""
    keep_tags: int = 0
    """Tags at the start of a caption that are neither shuffled nor dropped."""
    tag_dropout: float = 0.0
    """Probability with which each tag is left out of a draw."""
    dropout: float = 0.0
    """Probability with which a draw's whole prompt is empty, which teaches the model what guidance
    leads away from. Not for textual inversion, where the prompt is all that learns."""


@dataclass(frozen=True)
class OptimSettings:
    """How weights change."""

    learning_rate: float
    """Base learning rate; scale_lr says what it is multiplied by."""
    text_encoder_learning_rate: float | None = None
    """Base learning rate of the text encoder where it is trained; empty: learning_rate."""
    optimizer: Literal["adamw"] = "adamw"
    """The optimizer; adamw is Loshchilov and Hutter's decoupled weight decay."""
    scale_lr: Literal["linear", "sqrt", "none"] = "linear"
    """Multiply the learning rate by data-parallel processes x batch_size x
    gradient_accumulation_steps (linear), its square root (sqrt), or nothing (none)."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or down to zero at max_steps in a line or a half cosine."""
    lr_warmup_steps: int = 0
    """Optimizer steps over which the learning rate rises from zero."""
    max_grad_norm: float = 1.0
    """Largest norm of each subject's gradient; 0 means no clipping."""
    adam_beta1: float = 0.9
    """Decay of the running mean of gradients."""
    adam_beta2: float = 0.999
    """Decay of the running mean of squared gradients."""
    adam_epsilon: float = 1e-8
    """Added to the denominator of the update."""
    weight_decay: float | None = None
    """Decoupled weight decay; empty: 0 for textual inversion (vectors have no natural scale to
    shrink to), 0.01 for the others."""
    ema_decay: float = 0.0
    """Decay of an exponential moving average of the trained weights, such as 0.9999; results and
    previews are then made from the average. 0: no average."""

    def rate_of(self, part: str) -> float:
        """Base learning rate of a part of the model, such as "text_encoder"."""
        own = self.text_encoder_learning_rate if part == "text_encoder" else None
        return own or self.learning_rate


@dataclass(frozen=True)
class TrainSettings:
    """How long a run is and what it leaves behind on the way."""

    max_steps: int
    """Optimizer steps for each subject."""
    gradient_accumulation_steps: int = 1
    """Batches per optimizer step."""
    gradient_checkpointing: bool = False
    """Compute activations twice to keep fewer of them in memory."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one is always written at the end and on interruption."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    early_stop: bool = False
    """Score each subject at every checkpoint as score.* says: the result is its best state, not the
    last, and a subject that is over-trained early_stop_patience times in a row ends."""
    early_stop_patience: int = 3
    """Scorings in a row at which a subject must be over-trained before it ends."""
    sample_every: int = 0
    """Steps between preview pictures; 0 draws none but those at the end."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts of the previews, with {token} and {class_name}; empty: no previews."""
    sample_negative_prompt: str = ""
    """What previews should not show."""
    sample_steps: int = 20
    """Denoising steps of a preview."""
    sample_guidance_scale: float = 7.5
    """Guidance scale of a preview; 1 means none."""
    sample_seed: int = 0
    """Seed of the first preview of each prompt."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Experiment trackers to log to besides metrics.jsonl."""


@dataclass(frozen=True)
class FleetSettings:
    """Many subjects from a manifest, spread over workers (`disttrain fleet`)."""

    pack_size: Literal["auto"] | int = "auto"
    """Subjects that a worker trains together; auto: as many as memory allows, 32 at most."""
    claim: Literal["lease", "static"] = "lease"
    """How workers share the subjects: each claims the next ones from the shared run folder; or, on
    file systems without reliable locks, worker i of n takes every n-th."""
    lease_seconds: int = 60
    """A worker that gave no sign for so long has lost its subjects to whoever asks next."""
    wait_for_others: bool = True
    """A worker that finds nothing to claim waits while others train, to take over what they lose;
    false: it leaves."""


@dataclass(frozen=True)
class ScoreSettings:
    """How `disttrain score` and train.early_stop measure what was learned."""

    prompts: tuple[str, ...] = ()
    """Prompts that the subject is drawn with, with {token} and {class_name}; empty:
    instance_prompt where it has no {caption}, else the method's usual one."""
    sanity_prompts: tuple[str, ...] = ()
    """Prompts without the subject, which the base model's pictures should survive, with
    {class_name}; empty: "a photo of {class_name}", or "a photo" without a class name."""
    pictures: int = 8
    """Pictures drawn for each prompt."""
    steps: int = 20
    """Denoising steps of a picture."""
    guidance_scale: float = 7.5
    """Guidance scale of a picture; 1 means none."""
    seed: int = 0
    """Seed of the first picture of each prompt; every state is drawn with the same seeds."""
    features: str = "effnet"
    """What pictures are compared by: effnet (EffNet-I, works offline), or the folder or hub id of a
    CLIP model (CLIP-I and CLIP-T) or of a DINO or DINOv2 model."""
    through_autoencoder: bool = True
    """Compare with the subject's pictures as the base model's autoencoder keeps them, because what
    it loses cannot be learned; false: with the pictures themselves, as papers do."""


Strategy = Literal["auto", "ddp", "zero1", "zero2", "zero3", "fsdp"]


@dataclass(frozen=True)
class ParallelSettings:
    """How a model that trains whole lies over the processes of a run; results are the same."""

    strategy: Strategy = "auto"
    """ddp keeps everything on every process. DeepSpeed's zero1 splits the optimizer's state over
    them, zero2 gradients too, zero3 weights too (Rajbhandari et al. 2020); fsdp is torch's own way
    to split all three. auto: what an accelerate launch file says, else ddp. For lora and
    textual_inversion, which train a few MB, ddp."""
    offload_optimizer: bool = False
    """With DeepSpeed: keep the optimizer's state in the machine's memory and step there."""
    deepspeed_config: str = ""
    """DeepSpeed JSON whose zero_optimization section is used instead of the usual one; batch,
    accumulation, clipping and precision stay this config's."""
    force: bool = False
    """Split the frozen base of lora and textual_inversion by fsdp although ddp is faster."""


@dataclass(frozen=True)
class RunConfig:
    """One run: a base model, a method, and the subjects to teach."""

    name: str
    """Name of the run; its folder is output_dir/name."""
    method: MethodSettings
    """How subjects are taught."""
    subjects: tuple[SubjectSettings, ...]
    """Results to make; textual inversion and lora train them together, the others in turn."""
    optim: OptimSettings
    """How weights change."""
    train: TrainSettings
    """How long and what is left behind."""
    data: DataSettings = field(default_factory=DataSettings)
    """How pictures become batches."""
    captions: CaptionSettings = field(default_factory=CaptionSettings)
    """What the words of a picture are."""
    fleet: FleetSettings = field(default_factory=FleetSettings)
    """Many subjects from a manifest."""
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    """How a model lies over the processes of a run."""
    score: ScoreSettings = field(default_factory=ScoreSettings)
    """How what was learned is measured."""
    output_dir: str = "runs"
    """Folder that holds run folders, and the cache of latents they share."""
    base_model: str = "tiny"
    """tiny (embedded), a diffusers folder, a hub id, or a .safetensors or .ckpt file."""
    base_revision: str = ""
    """Branch, tag or commit of a hub id; empty: its default branch."""
    base_prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the base predicts; auto reads it from the model's own scheduler settings."""
    seed: int = 0
    """Seed of everything drawn in this run."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the forward and backward pass; fp16 needs a GPU."""

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        return Path(self.output_dir) / self.name

    @property
    def cache_folder(self) -> Path:
        """Where latents are cached, shared by the runs of one output_dir."""
        return Path(self.output_dir) / ".cache"

    @property
    def packable(self) -> bool:
        """Whether tensors have a subject axis, over one frozen base."""
        return isinstance(self.method, (TextualInversionSettings, LoraSettings))

    @property
    def trains_text(self) -> bool:
        """Whether the text encoder, or a word of its vocabulary, changes with each step."""
        method = self.method
        return isinstance(method, TextualInversionSettings) or method.train_text_encoder

    @property
    def together(self) -> bool:
        """Whether subjects train in one pack: they do when all pictures have one size."""
        return self.packable and not self.data.aspect_ratio_buckets

    @property
    def prior(self) -> PriorSettings | None:
        """Prior preservation when it is on."""
        method = self.method
        return method if isinstance(method, PriorSettings) and method.num_class_images else None

    @property
    def weight_decay(self) -> float:
        """Weight decay with the method's default filled in."""
        if self.optim.weight_decay is not None:
            return self.optim.weight_decay
        return 0.0 if isinstance(self.method, TextualInversionSettings) else 0.01
