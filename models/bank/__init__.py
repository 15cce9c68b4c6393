"""Memory banks in files: writing, editing, and fetching blocks from banks larger than memory."""

from mneme.models.bank.edit import (
    compact_bank,
    delete_block,
    delete_blocks,
    export_block,
    export_blocks,
    merge_banks,
    nodes_below,
    replace_block,
    replace_blocks,
)
from mneme.models.bank.manifest import (
    BankFiles,
    Manifest,
    model_hash,
    read_manifest,
    verify_bank,
    write_bank,
)
from mneme.models.bank.stored import StoredBank
from mneme.models.bank.tiers import Tier, fetch_seconds, tier_table
