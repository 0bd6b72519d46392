"""The only reader of the environment and of ``ppal.toml``: what the operator sets, and what a project may override."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainValidator,
    PrivateAttr,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from ppal_backend.errors import SettingsError

CONFIG_FILE = "ppal.toml"
_CREDENTIALS = re.compile(r"://[^/\s]*@")
_SECRETS = ("label_studio_api_key", "basic_auth_pass")
_BEFORE_HOST = re.compile(r"(?!https?:|s3:)[\w+.-]+://[^:/@]*:([^@]*)@")
_SECRETS_OF_BUCKETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")  # read by the bucket's own package
_FROM_FILE = "fields that the file sets"

TILE_PX = (64, 4096)
"""Least and most side of a tile."""


def as_slices(value: Any) -> int | str:
    """Whether images are looked at in tiles too: ``off``, ``auto``, or the side of a tile in pixels.

    Raises:
        ValueError: It is none of these.
    """
    if value in ("off", "auto"):
        return str(value)
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or not TILE_PX[0] <= number <= TILE_PX[1]:
        raise ValueError(f"expected off, auto, or the side of a tile from {TILE_PX[0]} to {TILE_PX[1]} px")
    return number


Budget = Annotated[int, Field(ge=1, le=100_000, description="new annotations that start a round; images queried")]
Slices = Annotated[int | str, PlainValidator(as_slices, json_schema_input_type=int | str)]
ScoreThreshold = Annotated[float, Field(ge=0.0, le=1.0, description="pre-annotations below are not shown")]


class ProjectDefaults(BaseModel):
    """What the operator sets for all projects and a project may choose for itself: each with its one bound and default.

    A detector is named, never given as a path: a project owner cannot make the backend load files.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    detector: str = Field(
        "auto",
        pattern=r"^[a-z0-9][a-z0-9_]{0,63}$",
        description="a detector of the model zoo; auto: the first that suits the device and whose weights can be had",
    )
    budget: Budget = 50
    strategy: str = Field("auto", max_length=64)
    delta: float = Field(8.0, gt=1.0, le=100.0, description="images that the next ones are chosen from: delta x budget")
    score_threshold: ScoreThreshold = 0.3
    holdout_fraction: float = Field(
        0.2, ge=0.0, le=0.5, description="share of all tasks, drawn at random, that measure the detector"
    )
    evaluation_images: int = Field(
        40,
        ge=10,
        le=2000,
        description="labelled images that suffice to measure it, with 5 boxes of each class",
    )
    keep_better: bool = Field(
        False, description="leave the model in force where a new one is worse on the same images, beyond doubt"
    )
    train_on_everything: bool = Field(
        False, description="train on the images that measure the detector too: such a version is not measured"
    )
    max_iterations: int | None = Field(None, ge=1, description="training length; default by data set size")
    init_weights: Literal["zoo", "last", "random"] = Field(
        "zoo", description="where a training starts: the zoo's weights, the project's last version, or nothing"
    )
    difficulty: bool = Field(True, description="follow class difficulty; false: every class weighs 1")
    patience: int | None = Field(
        None, ge=1, description="end a training after so many evaluations without a better mAP"
    )
    deterministic: bool = Field(False, description="the same bits on every run on a GPU too, at some cost in speed")
    mixed_precision: bool = Field(
        True, description="train in half precision where the device is faster so and the detector allows it"
    )
    embedding: Literal["query", "sampled"] = Field(
        "query", description="what describes a detection of DETR's relatives: its query, or the maps at its box"
    )
    cold_start: Literal["typical", "random"] = Field(
        "random", description="order of a pool that no model has seen; typical needs the zoo's initial weights"
    )
    slices: Slices = Field(
        "off", description="small objects: learn and look in tiles too; auto, or a tile's side in pixels of the image"
    )
    other_shapes: bool = Field(False, description="learn polygons, ellipses and brush masks as the boxes around them")
    pool_minutes: float | None = Field(
        None,
        ge=0.1,
        le=100_000,
        allow_inf_nan=False,
        description="minutes that a round may look at the pool; images it does not get to keep their last place",
    )
    seed: int = Field(0, ge=0, lt=2**31)


class ProjectOptions(ProjectDefaults):
    """What one project may choose for itself through the "extra parameters" of its model connection."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    from_name: str | None = Field(None, max_length=256, description="the RectangleLabels control to use")


class Settings(ProjectDefaults, BaseSettings):
    """Operator settings: environment variables (docs/settings.md), then ``ppal.toml``, then the defaults."""

    model_config = SettingsConfigDict(env_prefix="PPAL_", extra="ignore", populate_by_name=True)
    _from_file: frozenset[str] = PrivateAttr(default=frozenset())

    label_studio_url: str = Field("", validation_alias=AliasChoices("LABEL_STUDIO_URL", "LABEL_STUDIO_HOST"))
    label_studio_api_key: SecretStr = Field(SecretStr(""), validation_alias="LABEL_STUDIO_API_KEY")
    model_dir: Path = Field(Path("ppal-data"), validation_alias="MODEL_DIR")
    cache_dir: Path = Field(
        Path("~/.cache/ppal"),
        validation_alias="PPAL_CACHE",
        description="what outlives a project: compiled packages, downloaded weights, the demo's database template",
    )
    device: str = Field("auto", validation_alias="DEVICE", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    log_level: str = Field("INFO", validation_alias="LOG_LEVEL", pattern=r"^(DEBUG|INFO|WARNING|ERROR)$")
    log_format: Literal["text", "json"] = Field("text", validation_alias="LOG_FORMAT")
    basic_auth_user: str = Field("", validation_alias="BASIC_AUTH_USER")
    basic_auth_pass: SecretStr = Field(SecretStr(""), validation_alias="BASIC_AUTH_PASS")

    host: str = "0.0.0.0"
    port: int = Field(9090, ge=0, le=65535)
    public_url: str = ""
    label_studio_public_url: str = Field(
        "",
        validation_alias="LABEL_STUDIO_PUBLIC_URL",
        description="Label Studio as people's browsers reach it, for links; LABEL_STUDIO_URL when empty",
    )
    zoo_dir: Path | None = Field(None, validation_alias="PPAL_MODEL_ZOO", description="the operator's own detectors")
    database_url: str = ""
    queue_url: SecretStr = SecretStr("")
    artifacts: str = Field(
        "", description="where rounds are copied to for machines without a shared MODEL_DIR, as s3://bucket/prefix"
    )
    min_free_gib: float = Field(1.0, ge=0.0, description="free disk space that a round needs to go on")
    keep_artifacts: int = Field(5, ge=1, description="versions per project whose files stay on disk")
    image_cache_gib: float | None = Field(
        None, ge=0.0, description="most space for fetched images; by default a fifth of the disk"
    )
    keep_events_days: float = Field(30.0, gt=0.0, description="how long events stay after they were handled")
    poll_interval_s: float = Field(60.0, ge=1.0)
    keep_versions: int = Field(3, ge=1)
    publish_tasks: int = Field(
        5_000, ge=0, description="tasks at the front of a queue that Label Studio gets, at least four budgets; 0: all"
    )
    repair_queue: bool = Field(
        True, description="set a project's task sampling and model version right once when somebody changes them"
    )
    times_by_annotator: bool = Field(
        False, description="tell on the first page of each annotator how long an image takes; from the next round on"
    )
    max_request_mib: int = Field(64, ge=1)
    max_image_megapixels: int = Field(100, ge=1)
    allowed_image_hosts: str = ""
    threads: int | None = Field(None, ge=1)
    gpus: int = Field(1, ge=1, description="processes that train one detector together, each with a GPU of its own")
    engine: Literal["local", "ray"] = Field("local", description="where detectors train and predict")
    ray_address: str = Field(
        "", validation_alias="RAY_ADDRESS", description="host:port of the Ray cluster; empty: this machine alone"
    )
    tracking: Literal["", "tensorboard", "mlflow"] = Field("", description="curves of trainings, in the round's folder")

    # With a second name in the environment; what they may be stands above.
    budget: Budget = Field(
        ProjectDefaults.model_fields["budget"].default,
        validation_alias=AliasChoices("START_TRAINING_EACH_N_UPDATES", "PPAL_BUDGET"),
    )
    score_threshold: ScoreThreshold = Field(
        ProjectDefaults.model_fields["score_threshold"].default,
        validation_alias=AliasChoices("SCORE_THRESHOLD", "PPAL_SCORE_THRESHOLD"),
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Overrides go before the environment, that goes before the file."""
        path = config_file()
        return (init_settings, env_settings, *(() if path is None else (_ConfigFile(settings_cls, path),)))

    @model_validator(mode="wrap")
    @classmethod
    def _remember_origins(cls, values: dict[str, Any], handler: ModelWrapValidatorHandler[Settings]) -> Settings:
        from_file = values.pop(_FROM_FILE, ())
        settings = handler(values)
        settings._from_file = frozenset(from_file)
        return settings

    @field_validator("model_dir", "cache_dir", "zoo_dir")
    @classmethod
    def _home_folder(cls, value: Path | None) -> Path | None:
        return None if value is None else _expanded(value)

    @field_validator("label_studio_url", "label_studio_public_url", "public_url")
    @classmethod
    def _http_url(cls, value: str) -> str:
        value = value.strip().rstrip("/")
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("expected a URL such as http://localhost:8080 (with http:// or https://)")
        if urlsplit(value).username is not None:
            raise ValueError("expected a URL without credentials: it is stored and shown; use the settings for them")
        return value

    @field_validator("artifacts")
    @classmethod
    def _bucket_url(cls, value: str) -> str:
        if value and "://" not in value:
            raise ValueError("expected an address such as s3://bucket/prefix")
        if "@" in urlsplit(value).netloc:
            raise ValueError("expected an address without credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
        return value.strip().rstrip("/")

    @property
    def from_file(self) -> frozenset[str]:
        """Names of the fields whose value comes from ``ppal.toml``."""
        return self._from_file

    @property
    def state_url(self) -> str:
        """SQLAlchemy URL of the state database; SQLite in ``model_dir`` unless one is set."""
        return self.database_url or f"sqlite:///{self.model_dir.resolve() / 'ppal.db'}"

    @property
    def jobs_file(self) -> Path:
        """SQLite file of the job queue."""
        return self.model_dir.resolve() / "jobs.db"

    @property
    def image_hosts(self) -> frozenset[str]:
        """Hosts beside Label Studio's own that images may come from; ``*`` is any with a public address."""
        return frozenset(h.strip().lower() for h in self.allowed_image_hosts.split(",") if h.strip())

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be shown: the token, the password, passwords within addresses, and the bucket's keys."""
        values = [getattr(self, name) for name in type(self).model_fields]
        fields = [value.get_secret_value() for value in values if isinstance(value, SecretStr)]
        texts = [*fields, *(value for value in values if isinstance(value, str))]
        addresses = [password for text in texts for password in passwords_in(text)]
        bucket = [os.environ.get(name, "") for name in _SECRETS_OF_BUCKETS]
        return tuple(secret for secret in (*fields, *addresses, *bucket) if secret)

    @property
    def own_zoo(self) -> Path:
        """Folder of the operator's own detectors, beside the packaged ones; ``ppal zoo add`` writes there."""
        return (self.zoo_dir or self.model_dir / "zoo").resolve()

    @property
    def model_zoo(self) -> Path | None:
        """Folder of the zoo in force: the operator's where there is one, else None for the packaged one."""
        return self.own_zoo if self.zoo_dir is not None or (self.own_zoo / "zoo.toml").is_file() else None

    @property
    def weights_dir(self) -> Path | None:
        """Folder for downloaded weights where the operator chose one; None for the default one of whoever trains."""
        return self.cache_dir.resolve() / "weights" if "cache_dir" in self.model_fields_set else None

    @property
    def image_folder(self) -> Path:
        """Where fetched images are kept."""
        return self.model_dir.resolve() / "images"

    def project_folder(self, project_id: int) -> Path:
        """Where a project's rounds live."""
        return self.model_dir.resolve() / "projects" / str(project_id)

    def project_options(self, overrides: dict[str, Any] | None = None) -> ProjectOptions:
        """The options in force for a project: the operator's defaults, then its own extra parameters.

        Raises:
            SettingsError: an extra parameter is unknown or out of range; the text names each.
        """
        defaults = {name: getattr(self, name) for name in ProjectDefaults.model_fields}
        try:
            return ProjectOptions(**{**defaults, **(overrides or {})})
        except ValidationError as error:
            raise SettingsError("extra parameters: " + explain(error)) from None


def explain(error: ValidationError, name_of: Callable[[str], str] = str) -> str:
    """One line that names every rejected field, what it got, and the fields there are.

    Args:
        error: What was rejected.
        name_of: What people call a field.
    """
    parts = []
    for item in error.errors():
        name = name_of(".".join(str(part) for part in item["loc"]) or "value")
        if item["type"] == "extra_forbidden":
            parts.append(f"{name!r} is unknown (known: {', '.join(ProjectOptions.model_fields)})")
        else:
            parts.append(f"{name}: {item['msg']}" + _shown(name, item.get("input")))
    return "; ".join(parts)


def _shown(name: str, value: Any) -> str:
    secret = any(word in name.lower() for word in ("key", "pass", "token"))
    shown = _CREDENTIALS.sub("://[credentials]@", str(value))[:80]
    return "" if secret or isinstance(value, dict) else f", got {shown!r}"


class _ConfigFile(TomlConfigSettingsSource):
    """What the file sets and nothing before it: a field may have several names in the environment."""

    def __init__(self, settings_cls: type[BaseSettings], path: Path) -> None:
        try:
            super().__init__(settings_cls, path)
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"expected TOML in {path}, got a file that cannot be read ({error}); fix it") from None
        _check_file(path, self.toml_data)

    def __call__(self) -> dict[str, Any]:
        taken = {name.lower() for name in self.current_state}
        used = {
            name: value
            for name, value in self.toml_data.items()
            if taken.isdisjoint({name, *(variable.lower() for variable in variables(name))})
        }
        return {**used, _FROM_FILE: tuple(used)}


def config_file() -> Path | None:
    """The settings file in force: the one that ``PPAL_CONFIG`` names, else ``ppal.toml`` in the working directory.

    Raises:
        SettingsError: ``PPAL_CONFIG`` names no file.
    """
    named = os.environ.get("PPAL_CONFIG", "")
    try:
        path = _expanded(Path(named or CONFIG_FILE))
    except ValueError as error:
        raise SettingsError(f"PPAL_CONFIG: {error}, got {named!r}") from None
    if named and not path.is_file():
        raise SettingsError(f"expected a settings file at PPAL_CONFIG, got no file {named}; correct or unset it")
    return path if path.is_file() else None


def _expanded(path: Path) -> Path:
    """A path whose leading ``~`` or ``~USER`` is the home folder: no shell has seen what stands in a file."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("expected the whole path, or ~ or ~USER of a user who has a home folder") from None


def variables(field: str) -> tuple[str, ...]:
    """The environment variables that set a field of ``Settings``; none for another name."""
    if field not in Settings.model_fields:
        return ()
    alias = Settings.model_fields[field].validation_alias
    if isinstance(alias, AliasChoices):
        return tuple(str(choice) for choice in alias.choices)
    return (str(alias or f"PPAL_{field.upper()}"),)


def _check_file(path: Path, values: dict[str, Any]) -> None:
    known = sorted(
        (n for n in Settings.model_fields if n not in _SECRETS), key=ProjectDefaults.model_fields.__contains__
    )
    for name, value in values.items():
        if name not in Settings.model_fields:
            raise SettingsError(f"{path}: {name!r} is unknown (known: {', '.join(known)}); correct or remove it")
        if name in _SECRETS or (isinstance(value, str) and passwords_in(value)):
            raise SettingsError(
                f"expected no secret in {path}, got one under {name!r}; take it out and set {variables(name)[0]} in "
                "the environment"
            )


def passwords_in(address: str) -> set[str]:
    """The passwords in an address, as they stand there and as they are meant; none in a text that is no address.

    They stand before the host, where drivers of databases take ``/``, ``?`` and ``#`` unescaped, or in the query.
    """
    if "://" not in address:
        return set()
    parts, before_host = urlsplit(address), _BEFORE_HOST.match(address)
    found = {parts.password or "", before_host[1] if before_host else ""}
    found |= {value for key, value in parse_qsl(parts.query) if is_password(key)}
    return {form for text in found for form in (text, unquote(text)) if form}


def is_password(key: str) -> bool:
    """Whether a parameter of this name in an address holds a password."""
    return "pass" in key.lower()


def load_settings(**overrides: Any) -> Settings:
    """Read the environment and ``ppal.toml``.

    Raises:
        SettingsError: a variable is missing or out of range, or the file cannot be used.
    """
    try:
        return Settings(**overrides)
    except ValidationError as error:
        path = config_file()
        where = "settings" if path is None else f"settings (environment and {path})"
        raise SettingsError(f"{where}: " + explain(error, lambda name: _given_as(name, overrides))) from None


def _given_as(name: str, overrides: Mapping[str, Any]) -> str:
    """What the value of a field was given as: an override, a variable of the environment, or a key of the file."""
    field = next((field for field in Settings.model_fields if name in (field, *variables(field))), name)
    given = next((n for n in (field, *variables(field)) if n in overrides), None)
    there = {variable.upper(): variable for variable in os.environ}
    variable = next((there[v] for v in variables(field) if v in there), None)
    return given or (f"{variable} ({field})" if variable else field)
