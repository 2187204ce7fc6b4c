//! What ends a run from outside: an interrupt (Ctrl-C) or a request to terminate. The first one asks; a second one ends the
//! process at once.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::error::{Error, Result};

/// A flag that such a signal raises from now on.
///
/// # Errors
/// The system refuses.
pub(super) fn stop() -> Result<Arc<AtomicBool>> {
    let stop = Arc::new(AtomicBool::new(false));
    let watch = |signal| -> io::Result<()> {
        // In this order: the second signal finds the flag raised.
        flag::register_conditional_default(signal, Arc::clone(&stop))?;
        flag::register(signal, Arc::clone(&stop))?;
        Ok(())
    };
    for signal in [SIGINT, SIGTERM] {
        watch(signal).map_err(|e| Error::io("watch", Path::new("signals"), e))?;
    }
    Ok(stop)
}
