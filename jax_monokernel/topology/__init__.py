"""What a device looks like: groups of units, memory domains, and what crossing them costs (docs/topology.md)."""

from jax_monokernel.topology.discover import Found, discover, gpus, measure_device, page_homes
from jax_monokernel.topology.host import host_topology
from jax_monokernel.topology.measure import measure
from jax_monokernel.topology.measurement import Measurement, topology_of
from jax_monokernel.topology.model import CONSTANTS, Constant, Group, Interleave, MemoryDomain, Topology
from jax_monokernel.topology.near import pack_near
from jax_monokernel.topology.partition import Partition, partition_of
from jax_monokernel.topology.parts import modes, part, part_for, part_names
from jax_monokernel.topology.placement import Placement, apply_order, page_traffic, place, place_tape, undo_order
from jax_monokernel.topology.probe import ProbeError
from jax_monokernel.topology.store import record, recorded
from jax_monokernel.topology.text import tree

__all__ = [
    "CONSTANTS",
    "Constant",
    "Found",
    "Group",
    "Interleave",
    "Measurement",
    "MemoryDomain",
    "Partition",
    "Placement",
    "ProbeError",
    "Topology",
    "apply_order",
    "discover",
    "gpus",
    "host_topology",
    "measure",
    "measure_device",
    "modes",
    "pack_near",
    "page_homes",
    "page_traffic",
    "part",
    "part_for",
    "part_names",
    "partition_of",
    "place",
    "place_tape",
    "record",
    "recorded",
    "topology_of",
    "tree",
    "undo_order",
]
