"""Durable state: projects, events, the annotation ledger, rounds and model versions."""

from ppal_backend.store.database import Database
from ppal_backend.store.events import EventRecord, EventStore
from ppal_backend.store.ledger import AnnotationLedger, SeenAnnotation
from ppal_backend.store.projects import ProjectRecord, ProjectStore
from ppal_backend.store.rounds import CRASH_LIMIT, LEASE_S, RoundRecord, RoundStore
from ppal_backend.store.sides import ProjectSides, SideStore
from ppal_backend.store.steering import ProjectSteering, SteeringStore
from ppal_backend.store.store import Store, announce, database_file, find_store, hint_of_another, open_store
from ppal_backend.store.tables import now
from ppal_backend.store.versions import ModelVersion, VersionStore
from ppal_backend.store.workers import ALIVE_WITHIN_S, LABEL_STUDIO_NOTE, Heartbeat, Lease, WorkerStore

__all__ = [
    "ALIVE_WITHIN_S",
    "CRASH_LIMIT",
    "LABEL_STUDIO_NOTE",
    "LEASE_S",
    "AnnotationLedger",
    "Database",
    "EventRecord",
    "EventStore",
    "Heartbeat",
    "Lease",
    "ModelVersion",
    "ProjectRecord",
    "ProjectSides",
    "ProjectSteering",
    "ProjectStore",
    "RoundRecord",
    "RoundStore",
    "SeenAnnotation",
    "SideStore",
    "SteeringStore",
    "Store",
    "VersionStore",
    "WorkerStore",
    "announce",
    "database_file",
    "find_store",
    "hint_of_another",
    "now",
    "open_store",
]
