"""Memory banks in files: writing, editing, and fetching blocks from banks larger than memory."""

from models.bank.edit import (
    delete_block,
    delete_blocks,
    export_block,
    export_blocks,
    merge_banks,
    nodes_below,
    replace_block,
    replace_blocks,
)
from models.bank.errors import BankError
from models.bank.hashing import anchor_hash
from models.bank.layout import LevelLayout
from models.bank.level_file import LevelFile
from models.bank.manifest import Manifest, open_levels, read_manifest, verify_bank
from models.bank.stored import StoredBank
from models.bank.tiers import Tier, fetch_seconds, tier_table
from models.bank.writer import write_bank
