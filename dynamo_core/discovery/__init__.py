"""Discovery: who is there, kept alive by leases. The contract is in `contract.py`; `memory` and `file` are built in."""

from dynamo_core.discovery.contract import LEASE_TTL, Change, Delete, Discovery, Lease, Put, Resync, Synced

__all__ = ["LEASE_TTL", "Change", "Delete", "Discovery", "Lease", "Put", "Resync", "Synced"]
