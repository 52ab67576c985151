//! Places in files, and reading and writing there from several threads at once: no cursor is moved that another relies on.

use std::fs::File;
use std::io;
use std::ops::Range;

use wgpu_optim::storage::Codec;

/// A byte of one of several files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The file, by its number.
    pub file: usize,
    /// The byte, counted from the file's start.
    pub offset: u64,
}

impl At {
    /// So many bytes behind it.
    pub fn plus(self, bytes: u64) -> Self {
        Self {
            offset: self.offset + bytes,
            ..self
        }
    }
}

/// Elements of a tensor's values that lie side by side in one file. All of them do, or several parts make a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The elements.
    pub elems: Range<u64>,
    /// The place of the first of them.
    pub at: At,
    /// The codec of the elements.
    pub codec: Codec,
}

impl Part {
    /// All elements of a tensor.
    pub fn whole(numel: u64, at: At, codec: impl Into<Codec>) -> Self {
        Self {
            elems: 0..numel,
            at,
            codec: codec.into(),
        }
    }

    /// The place of an element.
    pub fn place(&self, elem: u64) -> At {
        self.at
            .plus((elem - self.elems.start) * self.codec.elem_bytes())
    }

    /// The bytes that they take.
    pub fn bytes(&self) -> u64 {
        (self.elems.end - self.elems.start) * self.codec.elem_bytes()
    }
}

/// Fills `buffer` from byte `offset` on; [`io::ErrorKind::UnexpectedEof`] where the file ends before.
pub fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
    }
    #[cfg(windows)]
    {
        use std::os::windows::fs::FileExt as _;
        let mut done = 0;
        while done < buffer.len() {
            match file.seek_read(&mut buffer[done..], offset + done as u64)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                read => done += read,
            }
        }
        Ok(())
    }
}

/// Writes all of `bytes` from byte `offset` on.
pub fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
    }
    #[cfg(windows)]
    {
        use std::os::windows::fs::FileExt as _;
        let mut done = 0;
        while done < bytes.len() {
            match file.seek_write(&bytes[done..], offset + done as u64)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                written => done += written,
            }
        }
        Ok(())
    }
}
