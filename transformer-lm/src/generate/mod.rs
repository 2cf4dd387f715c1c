//! Text from a checkpoint, once or as a conversation.
