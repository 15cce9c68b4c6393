"""Memory banks in files: writing, editing, and fetching blocks from banks larger than memory."""

from mneme.models.bank.edit import (
    delete_block,
    delete_blocks,
    export_block,
    export_blocks,
    merge_banks,
    nodes_below,
    replace_block,
    replace_blocks,
)
from mneme.models.bank.errors import BankError
from mneme.models.bank.hashing import model_hash
from mneme.models.bank.layout import LevelLayout
from mneme.models.bank.level_file import LevelFile
from mneme.models.bank.manifest import Manifest, open_levels, read_manifest, verify_bank
from mneme.models.bank.stored import StoredBank
from mneme.models.bank.tiers import Tier, fetch_seconds, tier_table
from mneme.models.bank.writer import write_bank
